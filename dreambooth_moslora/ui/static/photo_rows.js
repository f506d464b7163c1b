const PER_PAGE = 12;
const [list, template, pages, range] = [".photo-rows", "template", ".row-pages", ".row-range"]
  .map((name) => element.querySelector(name));
const typed = new Map(props.value || []), rows = new Map();
let page = 0, reset = props.reset;

const cards = () => props.cards || [];
const inOneLine = (text) => text.replace(/[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+/g, " ");

function say() {
  props.value = cards().map(({photo}) => [photo, typed.get(photo) || ""]);
  trigger("written");
}

function rowOf(photo) {
  if (!rows.has(photo)) {
    const row = template.content.firstElementChild.cloneNode(true);
    const box = row.querySelector("textarea");
    box.addEventListener("input", () => { typed.set(photo, inOneLine(box.value)); say(); });
    box.addEventListener("change", () => trigger("keep"));
    row.addEventListener("click", ({target}) => {
      const {event} = target.closest("button")?.dataset || {};
      if (event === "mask") trigger("mask", {photo});
      if (event === "drop") { row.classList.add("row-leaves"); trigger("drop", {photo}); }
    });
    rows.set(photo, row);
  }
  return rows.get(photo);
}

function draw() {
  const last = Math.max(0, Math.ceil(cards().length / PER_PAGE) - 1), typing = document.activeElement;
  page = Math.min(Math.max(page, 0), last);
  const first = page * PER_PAGE, shown = cards().slice(first, first + PER_PAGE);
  list.replaceChildren(...shown.map(({photo, picture, remark}, place) => {
    const row = rowOf(photo), name = `photo ${first + place + 1}`, box = row.querySelector("textarea");
    row.classList.remove("row-leaves");
    Object.assign(row.querySelector("img"), {src: picture, alt: `${name}, as it is cropped`});
    if (box.value !== (typed.get(photo) || "")) box.value = typed.get(photo) || "";
    box.setAttribute("aria-label", `Caption of ${name}`);
    for (const button of row.querySelectorAll("button"))
      button.setAttribute("aria-label", `${button.textContent}: ${name}`);
    row.querySelector(".row-remark").textContent = `${first + place + 1} · ${remark}`;
    return row;
  }));
  if (list.contains(typing)) typing.focus();
  pages.hidden = last === 0;
  range.textContent = `${first + 1}–${first + shown.length} of ${cards().length}`;
}

function take(isNew) {
  if (props.reset !== reset) typed.clear();
  reset = props.reset;
  for (const {photo, caption, made} of cards()) {
    if (!typed.has(photo)) typed.set(photo, caption);
    if (!typed.get(photo) && isNew) typed.set(photo, made);
  }
  say();
  if (cards().length) trigger("keep");
  draw();
}

element.querySelector(".row-tools").addEventListener("click", ({target}) => {
  const {event, step} = target.closest("button")?.dataset || {};
  if (event === "write") trigger("write");
  if (event === "masks") trigger("masks");
  if (step) { page += Number(step); draw(); }
});
watch(Object.keys(props).filter((name) => /^(cards|reset)$/.test(name)), () => take(true));
take(!props.value);
