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
<meta name="viewport" content="width=device-width, initial-scale=1">
<script>
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
  if (event.key === "/" && !typing) {
    const prompt = document.querySelector("#prompt textarea");
    if (prompt && prompt.offsetParent) { event.preventDefault(); prompt.focus(); }
  }
});
</script>
"""

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#top { align-items: baseline; justify-content: space-between; padding: 4px 2px 0; }
#top h1 { font-size: 1.25rem; margin: 0; letter-spacing: -.01em; }
#top .faint { text-align: right; }
.faint, .faint p { color: var(--body-text-color-subdued); font-size: .82rem; }
.tight { gap: 8px !important; align-items: end; }
.icon { font-size: 1.05rem; padding: 0 !important; }

#generate { display: grid !important; grid-template-columns: minmax(300px, 5fr) minmax(0, 8fr);
  grid-template-areas: "ask results" "settings results"; grid-template-rows: auto 1fr; gap: 16px; }
#ask { grid-area: ask; } #results { grid-area: results; } #settings { grid-area: settings; }
#generate > div { min-width: 0 !important; width: 100%; }

.card { border: 1px solid var(--block-border-color); border-radius: var(--radius-lg);
  background: var(--block-background-fill); padding: 12px 14px; }
.card.run { display: flex; gap: 14px; align-items: center; min-height: 104px; }
.card .thumb { width: 78px; height: 78px; object-fit: cover; border-radius: var(--radius-md); flex: none;
  image-rendering: auto; }
.card .words { flex: 1; min-width: 0; }
.card .line { font-weight: 550; }
.card .bar { height: 6px; border-radius: 3px; background: var(--neutral-200); margin: 8px 0; overflow: hidden; }
.dark .card .bar { background: var(--neutral-700); }
.card .bar i { display: block; height: 100%; background: var(--primary-600); transition: width .15s linear; }
.card.notice.good { border-left: 4px solid var(--primary-600); }
.card.notice.bad { border-left: 4px solid var(--color-red-500, #dc2626); }
.card.notice.info { border-left: 4px solid var(--neutral-400); }
table.facts { width: 100%; border-collapse: collapse; font-size: .9rem; }
table.facts th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); width: 11rem;
  vertical-align: top; padding: 4px 12px 4px 0; }
table.facts td { padding: 4px 0; overflow-wrap: anywhere; white-space: pre-wrap; }
pre.log { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow: auto; }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
@media (max-width: 760px) {
  .gradio-container { padding: 8px !important; }
  #generate { grid-template-columns: minmax(0, 1fr); grid-template-areas: "ask" "results" "settings"; gap: 12px; }
  table.facts th { width: 7.5rem; }
}
"""
