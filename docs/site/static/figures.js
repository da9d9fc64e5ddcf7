// Draws the figures of a notebook, in the colours of the page, and again when the page's theme changes.
(() => {
  const dark = () => {
    const theme = document.body.dataset.theme;
    return theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  };
  const draw = () => {
    const style = getComputedStyle(document.body);
    const text = style.getPropertyValue("--color-foreground-primary").trim() || style.color;
    const grid = dark() ? "#444" : "#e6e6e6";
    for (const place of document.querySelectorAll(".plotly-figure")) {
      const script = place.querySelector("script[type='application/json']");
      place.figure ??= script.textContent;
      const { data, layout } = JSON.parse(place.figure);
      layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
      layout.font = { ...layout.font, color: text };
      // cells with texts are scrolled where they are much wider than the page: squeezed, their texts would lie on each other
      const written = data.some((trace) => trace.texttemplate);
      layout.autosize = !(written && layout.width > 1.2 * place.clientWidth);
      if (layout.autosize) delete layout.width;
      for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
        layout[name] = { ...layout[name], gridcolor: grid, zerolinecolor: grid, linecolor: text };
      }
      Plotly.react(place, data, layout, { responsive: true, displaylogo: false });
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    draw();
    new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  });
})();
