"""Keys on the page: Escape stops, / focuses the prompt."""

__all__ = ["HEAD"]

HEAD = """
<script>
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  const closes = document.querySelector(".preview, .options") || document.fullscreenElement;
  if (event.key === "Escape" && !closes) document.querySelector("#stop")?.click();
  if (event.key === "/" && !typing) {
    const prompt = document.querySelector("#prompt textarea");
    if (prompt && prompt.offsetParent) { event.preventDefault(); prompt.focus(); }
  }
}, true);
</script>
"""
