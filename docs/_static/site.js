// What the theme and docutils leave out for people who do not use a mouse or do not see the page.

// Formulas that scroll sideways can be reached, and scrolled, by keyboard. The theme sees to code and tables.
function reachScrollingFormulas() {
  for (const box of document.querySelectorAll("main div.math > mjx-container, main span.math")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-sidebar-primary summary")) {
    summary.setAttribute("aria-label", `Pages below ${summary.closest("li").querySelector("a").textContent.trim()}`);
  }
  // What is folded is called by its title, "Imports", not "Toggle hidden content".
  document.querySelectorAll("details.hide > summary").forEach((summary) => summary.removeAttribute("aria-label"));
  // docutils calls it a list, but its entries are no list items.
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role"));
});

window.addEventListener("load", () => {
  reachScrollingFormulas();
  window.MathJax?.startup?.promise.then(reachScrollingFormulas);
});
window.addEventListener("resize", reachScrollingFormulas);
