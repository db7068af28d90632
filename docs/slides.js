const slides = [...document.querySelectorAll("section")], stage = document.getElementById("stage");
let now = 0;
function show(n) {
  now = Math.max(0, Math.min(slides.length - 1, n));
  slides.forEach((slide, i) => { slide.classList.toggle("now", i === now); slide.inert = i !== now; });
  history.replaceState(null, "", "#" + (now + 1));
}
function scale() {
  const k = Math.min(innerWidth / 1280, innerHeight / 720);
  stage.style.transform = `scale(${k}) translate(-50%, -50%)`;
}
function fit() {  // what does not fit becomes smaller
  for (const slide of slides) {
    const body = slide.querySelector(".body");
    for (let size = 27; size > 13 && (body.scrollHeight > body.clientHeight + 1 || body.scrollWidth > body.clientWidth + 1
         || slide.scrollHeight > 720); size -= 1) slide.style.fontSize = size + "px";
  }
}
addEventListener("keydown", event => {
  const move = { ArrowRight: 1, PageDown: 1, ArrowDown: 1, " ": event.shiftKey ? -1 : 1, ArrowLeft: -1, PageUp: -1, ArrowUp: -1 }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (move) { event.preventDefault(); show(now + move); }
  if (event.key === "Home") show(0);
  if (event.key === "End") show(slides.length - 1);
  if (event.key === "d") {
    const dark = getComputedStyle(document.body).backgroundColor !== "rgb(255, 255, 255)";
    document.documentElement.className = dark ? "light" : "dark";
  }
});
addEventListener("click", event => { if (!getSelection().toString()) show(now + (event.clientX < innerWidth / 3 ? -1 : 1)); });
addEventListener("resize", scale);
addEventListener("hashchange", () => show((parseInt(location.hash.slice(1)) || 1) - 1));
scale();
show((parseInt(location.hash.slice(1)) || 1) - 1);
window.MathJax = {
  options: { enableMenu: false }, tex: { macros: { top: "\\mathsf{T}" } },
  startup: { pageReady: () => MathJax.startup.defaultPageReady().then(fit).then(() => { document.body.dataset.ready = "yes"; }) },
};
