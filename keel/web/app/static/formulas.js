// Sets the formulas of a page with Temml, which is fetched from this server when there is one. It makes MathML: no fonts,
// and no styles that the content policy would have to allow. What can't be set stays there as its source.

const SHOWN = { displayMode: false, annotate: false, throwOnError: true, trust: false, maxSize: [5, 60], maxExpand: 100 };
const MOST_ELEMENTS = 3000; // of one formula
const DEEPEST = 60; // elements within elements
const NEVER = ["id", "href", "tabindex", "onclick"]; // names of the page's own things, links
const ALLOWED = "http://www.w3.org/1998/Math/MathML";
let library;

function load() {
  const at = new URL("./temml/", import.meta.url);
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("temml.css", at) }));
  return new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: new URL("temml.min.js", at), onerror: reject });
    script.onload = () => resolve(globalThis.temml);
    document.head.append(script);
  });
}

/** Whether a tree of elements is neither too large nor too deep to be laid out; takes off what could reach the page. */
function harmless(root) {
  let count = 0;
  for (let level = [root], depth = 0; level.length; level = level.flatMap((one) => [...one.children]), depth += 1) {
    count += level.length;
    if (depth > DEEPEST || count > MOST_ELEMENTS) return false;
    for (const one of level) {
      if (one !== root && one.namespaceURI !== ALLOWED && !["span", "br"].includes(one.localName)) return false;
      for (const name of NEVER) one.removeAttribute(name);
    }
  }
  return true;
}

function set(temml, place) {
  if (!place.isConnected) return;
  const source = place.textContent;
  const two = source.startsWith("$$") || source.startsWith("\\");
  const made = Object.assign(document.createElement("span"), { className: "formula", dir: "ltr" });
  place.classList.replace("tex", "source");
  try {
    const displayMode = /^(\$\$|\\\[)/.test(source);
    temml.render(source.slice(two ? 2 : 1, two ? -2 : -1), made, { ...SHOWN, macros: {}, displayMode });
  } catch {
    place.title = "This formula can’t be read";
    return;
  }
  if (harmless(made)) place.replaceWith(made);
}

async function setAll() {
  const places = document.querySelectorAll("code.tex");
  if (!places.length) return;
  try {
    library ??= load();
    const temml = await library;
    for (const place of document.querySelectorAll("code.tex")) set(temml, place);
  } catch {
    library = undefined; // no connection: tried again with the next one
  }
}

new MutationObserver(setAll).observe(document.documentElement, { childList: true, subtree: true });
setAll();
