"use strict";
// One token at a time is looked at in all three maps of a sample; its numbers stand below them.
for (const figure of document.querySelectorAll(".heat")) {
  const maps = [...figure.querySelectorAll(".map")].map((map) => [...map.querySelectorAll("[title]")]);
  const panels = [...figure.querySelectorAll(".map")];
  const readout = figure.querySelector(".readout");
  const hint = readout.textContent;
  let at = -1;

  const look = (next) => {
    for (const cells of maps) cells[at]?.classList.remove("at");
    at = Math.min(Math.max(next, -1), maps[0].length - 1);
    for (const cells of maps) cells[at]?.classList.add("at");
    const cell = maps[0][at];
    readout.textContent = cell ? `“${cell.textContent.trim() || "space"}”  ${cell.title}` : hint;
  };

  const index = (event) => {
    const cell = event.target.closest?.("[title]");
    const panel = cell?.closest(".map");
    return panel ? maps[panels.indexOf(panel)].indexOf(cell) : -1;
  };
  figure.addEventListener("pointerover", (event) => look(index(event)));
  figure.addEventListener("pointerleave", () => look(-1));
  for (const panel of panels) {
    panel.addEventListener("focus", () => at < 0 && look(0));
    panel.addEventListener("blur", () => look(-1));
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowRight: at + 1, ArrowLeft: Math.max(at - 1, 0), Home: 0, End: Infinity };
      if (!(event.key in step) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      look(step[event.key]);
      maps[panels.indexOf(panel)][at]?.scrollIntoView({ block: "nearest" });
    });
  }
}
