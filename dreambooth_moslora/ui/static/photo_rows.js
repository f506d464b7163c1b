const [grid, hint, panel, template] = [".photo-grid", ".photo-hint", ".photo-open", "template"]
  .map((name) => element.querySelector(name));
const [box, remarkLine] = ["textarea", ".photo-remark"]
  .map((name) => panel.querySelector(name));
const typed = new Map(props.value || []), saved = new Map(), tiles = new Map();
let open = "";

const cards = () => props.cards || [];
const inOneLine = (text) => text.replace(/[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+/g, " ");

function sendCaptions() {
  props.value = cards().map(({photo}) => [photo, typed.get(photo) || ""]);
}

function getTile(photo) {
  if (!tiles.has(photo)) {
    const tile = template.content.firstElementChild.cloneNode(true);
    tile.querySelector(".photo-pick").addEventListener("click", () => {
      open = open === photo ? "" : photo;
      draw();
      if (open) box.focus({preventScroll: true});
    });
    tile.querySelector(".photo-drop").addEventListener("click", () => {
      tile.classList.add("photo-leaves");
      trigger("drop", {photo});
    });
    tiles.set(photo, tile);
  }
  return tiles.get(photo);
}

function draw() {
  const typing = document.activeElement;
  const current = cards().map(({photo, picture, remark}, index) => {
    const tile = getTile(photo), name = `photo ${index + 1}`, isGood = remark === "good";
    tile.classList.remove("photo-leaves");
    tile.classList.toggle("photo-chosen", photo === open);
    tile.classList.toggle("photo-bad", !isGood);
    tile.title = isGood ? typed.get(photo) || "no caption yet" : remark;
    Object.assign(tile.querySelector("img"), {src: picture, alt: `${name}, as it is cropped`});
    tile.querySelector(".photo-number").textContent = index + 1 + (typed.get(photo) ? " ✎" : "") + (isGood ? "" : " !");
    tile.querySelector(".photo-pick").setAttribute("aria-label", `Open ${name}`);
    tile.querySelector(".photo-drop").setAttribute("aria-label", `Remove: ${name}`);
    return tile;
  });
  // A tile that is inserted again while the mouse is down on it gets no click.
  const isInPlace = (tile, index) => tile === grid.children[index];
  if (current.length !== grid.children.length || !current.every(isInPlace)) {
    grid.replaceChildren(...current);
    if (grid.contains(typing)) typing.focus();
  }
  // The selected photo's caption, below all photos.
  const openIndex = cards().findIndex(({photo}) => photo === open);
  panel.hidden = openIndex < 0;
  hint.hidden = openIndex >= 0;
  if (openIndex < 0) return;
  const caption = typed.get(open) || "";
  if (box.value !== caption) box.value = caption;
  box.setAttribute("aria-label", `Caption of photo ${openIndex + 1}`);
  remarkLine.textContent = `Photo ${openIndex + 1}: ${cards()[openIndex].remark}`;
}

function takeCards() {
  if (!cards().some(({photo}) => photo === open)) open = "";
  for (const {photo, caption} of cards()) {
    // A caption that was dropped since replaces the typed one, unless that is being edited.
    const isNew = saved.has(photo) && saved.get(photo) !== caption && photo !== open;
    if (!typed.has(photo) || isNew) typed.set(photo, caption);
    saved.set(photo, caption);
  }
  sendCaptions();
  if (cards().length) trigger("keep");
  draw();
}

box.addEventListener("input", () => { typed.set(open, inOneLine(box.value)); sendCaptions(); });
box.addEventListener("change", () => { trigger("keep"); draw(); });
for (const name of ["masks", "drop_all", "new_subject"]) {
  element.querySelector(`[data-event=${name}]`).addEventListener("click", () => {
    const losesCaptions = name !== "masks" && cards().some(({photo}) => typed.get(photo));
    if (!losesCaptions || confirm("Remove all photos with their captions?")) trigger(name);
  });
}
watch(["cards"], takeCards);
takeCards();
