// What the theme and docutils leave out for people who do not use a mouse or do not see the page.

// What scrolls sideways can be reached, and scrolled, by keyboard.
function reachScrollingBoxes() {
  for (const box of document.querySelectorAll("main pre, main div.math, main table")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-sidebar-primary summary")) {
    summary.setAttribute("aria-label", `Pages below ${summary.closest("li").querySelector("a").textContent.trim()}`);
  }
  // docutils calls it a list, but its entries are no list items.
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role"));
});

window.addEventListener("load", () => {
  reachScrollingBoxes();
  window.MathJax?.startup?.promise.then(reachScrollingBoxes);
});
window.addEventListener("resize", reachScrollingBoxes);
