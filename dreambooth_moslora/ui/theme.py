"""How the page looks: one accent colour, system fonts (nothing is fetched), and a layout that folds on a phone."""

import gradio as gr

__all__ = ["CSS", "HEAD", "theme"]


def theme() -> gr.themes.Base:
    fonts = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        font=fonts,
        font_mono=mono,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_shadow="none",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )


HEAD = """
<script>
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  if (event.key === "Escape") document.querySelector("#stop")?.click();
  if (event.key === "/" && !typing) {
    const prompt = document.querySelector("#prompt textarea");
    if (prompt && prompt.offsetParent) { event.preventDefault(); prompt.focus(); }
  }
});
</script>
"""

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#top { align-items: baseline; justify-content: space-between; flex-wrap: nowrap; }
#top > * { width: auto; flex: none; }
#top h1 { font-size: 1.25rem; margin: 0; letter-spacing: -.01em; }
.faint, .faint p { color: var(--body-text-color-subdued); font-size: .82rem; }
.tight { gap: 8px !important; align-items: end; }
.tight > button, .tight > .block > button { height: 42px; font-size: .95rem; font-weight: 550; padding: 0 12px; }
.icon { font-size: 1.05rem !important; }
.step h3 { font-size: .95rem; margin: 4px 0 -4px; }
.remarks { margin: 6px 0 0 1.1rem; font-size: .85rem; color: var(--body-text-color-subdued); }
button[role="tab"] { font-weight: 500; }

#generate, #train, #inspect { display: grid !important; align-items: start; gap: 16px;
  grid-template-columns: minmax(300px, 5fr) minmax(0, 8fr); }
#generate { grid-template-areas: "ask results" "settings results"; grid-template-rows: auto 1fr; }
#ask { grid-area: ask; } #results { grid-area: results; } #settings { grid-area: settings; }
#generate > div, #train > div, #inspect > div { min-width: 0 !important; width: 100%; }
#status, #train_status, #status .pending, #train_status .pending { opacity: 1 !important; }
#gallery, #history { min-height: 240px; }
#gallery .grid-wrap, #history .grid-wrap, #crops .grid-wrap, #samples .grid-wrap { max-height: none !important; }

.card { border: 1px solid var(--block-border-color); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: 12px 14px; font-size: .92rem; }
.card.run { display: flex; gap: 14px; align-items: center; min-height: 86px; }
.card .thumb { width: 60px; height: 60px; object-fit: cover; border-radius: var(--radius-md); flex: none; }
.card .words { flex: 1; min-width: 0; }
.card .line { font-weight: 550; }
.card .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); margin: 7px 0; overflow: hidden; }
.dark .card .bar { background: var(--neutral-700); }
.card .bar i { display: block; height: 100%; background: var(--primary-600); transition: width .15s linear; }
.card.notice { border-left-width: 4px; }
.card.notice.good { border-left-color: var(--primary-600); }
.card.notice.bad { border-left-color: #dc2626; }
.card.notice.info { border-left-color: var(--neutral-400); }
table.facts { width: 100%; border-collapse: collapse; }
table.facts th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); width: 11rem;
  vertical-align: top; padding: 4px 12px 4px 0; }
table.facts td { padding: 4px 0; overflow-wrap: anywhere; white-space: pre-wrap; }
pre.log { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow: auto; }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
@media (max-width: 760px) {
  .gradio-container main { padding: 12px !important; }
  #generate, #train, #inspect { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  #generate { grid-template-areas: "ask" "results" "settings"; }
  table.facts th { width: 7.5rem; }
}
"""
