"""The page's CSS: first sizes, then the layout, which has one column on a phone. `theme` has colours and fonts.

`--picture-width` is the width of a preview, or of a single picture.
"""

__all__ = ["CSS"]

CSS = """
.gradio-container {
  --page-width: 1240px;
  --picture-width: 34rem;
  --gallery-height: 240px;
  --thumbnail: 60px;
}
.gradio-container { width: 100% !important; max-width: var(--page-width) !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#top { align-items: baseline; justify-content: space-between; flex-wrap: nowrap; }
#top > * { width: auto; flex: none; }
#top h1 { font-size: 1.25rem; margin: 0; letter-spacing: -.01em; }
.faint, .faint p { color: var(--body-text-color-subdued); font-size: .82rem; }
.tight { gap: 8px !important; align-items: end; }
.tight > button, .tight > .block > button { height: 42px; font-size: .95rem; font-weight: 550; padding: 0 12px;
  white-space: nowrap; }
.icon { font-size: 1.05rem !important; }
.step h3 { font-size: .95rem; margin: 4px 0 -4px; }
.remarks { margin: 6px 0 0 !important; padding-inline-start: 1.1rem !important; font-size: .85rem;
  color: var(--body-text-color-subdued); }
button[role="tab"] { font-weight: 500; }
.tab-container button.selected { color: var(--primary-700); }
.dark .tab-container button.selected { color: var(--primary-400); }

#generate, #train, #inspect { display: grid !important; align-items: start; gap: 16px;
  grid-template-columns: minmax(300px, 5fr) minmax(0, 8fr); }
#generate { grid-template-areas: "ask results" "settings results"; grid-template-rows: auto 1fr; }
#ask { grid-area: ask; } #results { grid-area: results; } #settings { grid-area: settings; }
#generate > div, #train > div, #inspect > div { min-width: 0 !important; width: 100%; }
#status, #train_status, #status .pending, #train_status .pending { opacity: 1 !important; }
#gallery, #history { min-height: var(--gallery-height); }
:is(#gallery, #history, .crops, #samples, #masks) .grid-wrap { min-height: 0 !important; max-height: none !important;
  overflow-y: auto; }
:is(#gallery, #history, .crops, #samples, #masks) .grid-container {
  grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
#gallery .grid-container:has(> :only-child) { grid-template-columns: minmax(0, var(--picture-width)) !important;
  justify-content: center; }
:is(#loss, #fidelity) svg text { fill: var(--body-text-color) !important; }
:is(#loss, #fidelity) svg :is(.role-axis-grid, .role-axis-tick) line,
:is(#loss, #fidelity) svg path.background:not(.role-legend *) { stroke: var(--border-color-primary) !important; }

#queued .wrap { flex-direction: column; }
#queued label { width: 100%; }

.card { border: 1px solid var(--block-border-color); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: 12px 14px; font-size: .92rem; }
.card.run { display: flex; gap: 14px; align-items: center; min-height: 86px; }
.card .thumb { width: var(--thumbnail); height: var(--thumbnail); object-fit: cover;
  border-radius: var(--radius-md); flex: none; }
.card .words { flex: 1; min-width: 0; }
.card .line { font-weight: 550; }
.card .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); margin: 7px 0; overflow: hidden; }
.dark .card .bar { background: var(--neutral-700); }
.card .bar i { display: block; height: 100%; background: var(--primary-600); transition: width .15s linear; }
.card.notice { border-left-width: 4px; }
.card.notice.good { border-left-color: var(--primary-600); }
.card.notice.bad { border-left-color: #dc2626; }
.card.notice.info { border-left-color: var(--neutral-400); }
table.facts { width: 100%; border-collapse: collapse; margin: 0 !important; }
table.facts, table.facts :is(tr, th, td) { border: 0 !important; }
table.facts tr + tr { border-top: 1px solid var(--block-border-color) !important; }
table.facts th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); width: 11rem;
  vertical-align: top; padding: 6px 12px 6px 0 !important; }
table.facts td { padding: 6px 0 !important; overflow-wrap: anywhere; white-space: pre-wrap; }
footer .divider { display: none; }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
@media (max-width: 760px) {
  #top { flex-wrap: wrap; }
  .gradio-container main { padding: 12px !important; }
  #generate, #train, #inspect { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  #generate { grid-template-areas: "ask" "results" "settings"; }
  table.facts th { width: 7.5rem; }
  .tight > button, .tight > .block > button { font-size: .88rem; padding: 0 8px; }
  .crops .grid-container { --grid-cols: 3 !important; }
  #samples .grid-container { --grid-cols: 2 !important; }
  .tab-wrapper { height: 48px !important; }
  .tab-container:not(.visually-hidden) { height: 40px !important; }
  #result_tabs .tab-container button { padding: 0 10px !important; }
  .head .tab-like-container { height: 36px !important; margin-bottom: 0 !important; }
  input[type="range"] { height: 32px; }
  input[type="range"]::-webkit-slider-thumb { width: 22px !important; height: 22px !important;
    margin-top: -7px !important; }
}
"""
