// What the theme and docutils leave out for people who do not use a mouse or do not see the page.

// Formulas that scroll sideways can be reached, and scrolled, by keyboard. The theme sees to code and tables.
function reachScrollingFormulas() {
  for (const box of document.querySelectorAll("main div.math > mjx-container, main span.math")) {
    const overhang = box.matches("span") ? 1 : 0; // of a slanted letter; in a line of text only wider ones scroll
    if (box.scrollWidth > box.clientWidth + overhang) box.tabIndex = 0;
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

// Search shows pieces of pages in which formulas are still TeX: letters and digits stay, anything with commands becomes "…".
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const textOf = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const formula of page.querySelectorAll(".math")) {
      const tex = formula.textContent.replace(/\\[()]/g, "");
      formula.textContent = /[\\{}]/.test(tex) ? "…" : tex;
    }
    return textOf(page.documentElement.outerHTML, anchor);
  };
});

window.addEventListener("load", () => {
  reachScrollingFormulas();
  window.MathJax?.startup?.promise.then(reachScrollingFormulas);
});
window.addEventListener("resize", reachScrollingFormulas);
