// What the theme's scripts leave to do for those who use no mouse, or do not see the page. The copy buttons' <nav>s, dozens
// of landmarks without a name, are no navigation; code and tables that scroll can be reached and scrolled by keyboard.
const amend = () => {
  document.querySelectorAll("nav.md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"));
  document
    .querySelectorAll("pre > code:not([tabindex]), .md-typeset__scrollwrap:not([tabindex])")
    .forEach((box) => box.setAttribute("tabindex", "0"));
};
new MutationObserver(amend).observe(document.documentElement, {
  attributeFilter: ["tabindex"],
  childList: true,
  subtree: true,
});
amend();
