card => {
  const found = new DOMParser().parseFromString(card, "text/html").querySelector(".large");
  return found ? found.outerHTML : "";
}
