// A displayed equation wider than the text is set smaller, down to six tenths; beyond that it scrolls.
const fit = () =>
  document.querySelectorAll("div.math").forEach((box) => {
    box.style.fontSize = "";
    const share = box.clientWidth / box.scrollWidth;
    if (share < 1) box.style.fontSize = `${Math.max(60, Math.floor(98 * share))}%`;
  });
addEventListener("load", () => window.MathJax && MathJax.startup.promise.then(fit));
addEventListener("resize", fit);
