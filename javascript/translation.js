// Translates our own tab, and our part of a WebUI's settings, and nothing else of the page: the words lie in the page as
// JSON (see webui/languages/). Each text keeps its English source, so that the language can be changed at any time.
(function () {
    "use strict";
    if (window.imageToLoraTranslation) return;
    window.imageToLoraTranslation = true;

    const OURS = "#i2l, #settings_i2l, #settings_section_tab_i2l";
    const SPOKEN = ["title", "aria-label", "aria-description", "placeholder", "alt"];
    const VERBATIM = ".i2l-value, #i2l_tips, #i2l_words, textarea, pre, code, script, style";
    const SEAMS = ["; ", ": "];
    const seen = new WeakSet(), sources = new WeakMap();
    let tables = null, hostLanguage = "", words = {}, patterns = [], known = new Map();

    // A browser that blocks the site's data throws at each of these.
    function remembered() {
        try { return localStorage.getItem("i2l_language") || ""; } catch (error) { return ""; }
    }

    function remember(language) {
        try { localStorage.setItem("i2l_language", language); } catch (error) { console.error(error); }
    }

    // zh_TW for zh-TW; where there is none, the first of the same language.
    function nearest(wanted, codes) {
        const [whole, short] = [wanted.toLowerCase().replace("-", "_"), wanted.slice(0, 2).toLowerCase()];
        return codes.find((code) => code.toLowerCase() === whole) || codes.find((code) => code.slice(0, 2) === short);
    }

    // What was chosen in the tab, else in the WebUI, else in the browser; a language that we lack is English.
    function choose() {
        const chosen = remembered() || hostLanguage;
        const wanted = chosen ? [chosen] : navigator.languages || [navigator.language];
        const codes = ["en", ...Object.keys(tables)];
        const code = wanted.map((one) => nearest(one, codes)).find(Boolean);
        words = tables[code] || {};
        const open = Object.entries(words).filter(([key]) => key.includes("{}"));
        patterns = open.sort(([one], [other]) => other.length - one.length).map(compile);  // the closest first
        known = new Map();
        return code || "en";
    }

    // A key with {} stands for every text that has something in their places.
    function compile([key, told]) {
        const parts = key.split("{}").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
        return [new RegExp("^" + parts.join("(.+?)") + "$", "s"), told];
    }

    function translated(text) {
        if (Object.hasOwn(words, text)) return words[text];
        if (!known.has(text)) {
            if (known.size > 2000) known.clear();
            known.set(text, filled(text));
        }
        return known.get(text);
    }

    function filled(text) {
        for (const [pattern, told] of patterns) {
            const found = pattern.exec(text);
            if (!found) continue;
            let number = 0;
            const value = (n) => (Object.hasOwn(words, found[n]) ? words[found[n]] : found[n]);
            return told.replace(/\{(\d*)\}/g, (_, n) => value(n ? Number(n) : ++number));
        }
        return SEAMS.reduce((told, seam) => (told === text ? joined(text, seam) : told), text);
    }

    // A list of phrases is translated one by one.
    function joined(text, seam) {
        const parts = text.split(seam);
        return parts.length > 1 ? parts.map(translated).join(seam) : text;
    }

    function speak(item, field, now, write) {
        const held = sources.get(item) || {};
        const source = held[field] && held[field].told === now ? held[field].source : now;
        const text = source.trim(), told = text ? source.replace(text, () => translated(text)) : source;
        held[field] = {source: source, told: told};
        sources.set(item, held);
        if (told !== now) write(told);
    }

    function translateText(node) {
        if (!node.parentElement || node.parentElement.closest(VERBATIM)) return;
        speak(node, "text", node.nodeValue, (told) => { node.nodeValue = told; });
    }

    function translate(place) {
        if (place.nodeType === Node.TEXT_NODE) translateText(place);
        if (place.nodeType !== Node.ELEMENT_NODE) return;
        const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) translateText(walker.currentNode);
        for (const name of SPOKEN) {
            for (const item of [place, ...place.querySelectorAll("[" + name + "]")]) {
                const now = item.getAttribute(name);
                if (now) speak(item, name, now, (told) => item.setAttribute(name, told));
            }
        }
    }

    const observer = new MutationObserver((changes) => {
        for (const change of changes) (change.type === "childList" ? change.addedNodes : [change.target]).forEach(translate);
        observer.takeRecords();  // our own changes
    });

    function switchLanguage() {
        const code = choose().replace("_", "-");
        document.querySelectorAll(OURS).forEach((root) => { root.lang = code; translate(root); });
        observer.takeRecords();
    }

    // A WebUI builds its page when it likes, and again when it is reloaded.
    function watch() {
        const held = document.getElementById("i2l_words");
        if (!held) return;
        if (!tables) {
            tables = JSON.parse(held.textContent);
            hostLanguage = held.dataset.i2lLanguage || "";
            choose();
        }
        for (const root of document.querySelectorAll(OURS)) {
            if (seen.has(root)) continue;
            seen.add(root);
            observer.observe(root, {subtree: true, childList: true, characterData: true, attributeFilter: SPOKEN});
            switchLanguage();
        }
        const list = document.querySelector("[data-i2l-language]:not(#i2l_words)");
        if (list && list.value !== remembered()) list.value = remembered();
    }

    document.addEventListener("change", (event) => {
        if (!tables || !event.target.matches("select[data-i2l-language]")) return;
        remember(event.target.value);
        switchLanguage();
    }, true);
    setInterval(watch, 200);
})();
