addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select, [contenteditable]");
  const closes = document.querySelector(".preview, .options") || document.fullscreenElement;
  if (event.key === "Escape" && !closes) document.querySelector("#stop")?.click();
  if (event.key === "/" && !typing) {
    const prompt = document.querySelector("#prompt textarea");
    if (prompt && prompt.offsetParent) { event.preventDefault(); prompt.focus(); }
  }
}, true);
document.addEventListener("load", ({target}) => {
  if (!target.matches(":is(#gallery, #history) img")) return;
  target.style.setProperty("--width", target.naturalWidth);
  target.style.setProperty("--height", target.naturalHeight);
}, true);
function bringIntoView(column, last) {
  const [first, end] = [column, last].map((id) => document.getElementById(id));
  const isSeen = first.getBoundingClientRect().top >= 0 && end.getBoundingClientRect().bottom <= innerHeight;
  if (!isSeen) first.scrollIntoView();
}
