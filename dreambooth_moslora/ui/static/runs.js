const [strip, template] = [".run-strip", "template"].map((name) => element.querySelector(name));

function draw() {
  const left = strip.scrollLeft, typing = strip.contains(document.activeElement) && document.activeElement.dataset.run;
  strip.replaceChildren(...(props.value?.cards || []).map(({run, picture, state, date, kind}) => {
    const card = template.content.firstElementChild.cloneNode(true);
    card.dataset.run = run;
    card.classList.toggle("run-chosen", run === props.value.chosen);
    card.setAttribute("aria-pressed", run === props.value.chosen);
    if (picture) card.querySelector("img").src = picture;
    card.querySelector("b").textContent = card.title = run;
    card.querySelector(".run-state").textContent = state;
    card.querySelector(".run-state").classList.add(kind);
    card.querySelector(".run-date").textContent = date;
    card.addEventListener("click", () => trigger("choose", {run}));
    return card;
  }));
  strip.scrollLeft = left;
  if (typing) strip.querySelector(`[data-run="${CSS.escape(typing)}"]`)?.focus({preventScroll: true});
}

watch(["value"], draw);
draw();
