card => {
  const image = new DOMParser().parseFromString(card, "text/html").querySelector(".large");
  return image ? image.outerHTML : "";
}
