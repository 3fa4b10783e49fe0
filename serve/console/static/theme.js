// Before anything is drawn: the colours that this browser chose. A classic script, so that nothing flashes.
(() => {
  const kept = (() => {
    try {
      return localStorage.getItem("llmops.theme");
    } catch {
      return null; // storage is switched off: as the system
    }
  })();
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
