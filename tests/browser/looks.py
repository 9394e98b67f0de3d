"""What is wrong with the page as it is shown: scripts that return a list of findings, [] where all is well."""

CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, under) => [0, 1, 2].map((n) => top[n] * top[3] + under[n] * (1 - top[3])).concat(1);
    const behind = (item) => {
        const layers = [];
        for (; item; item = item.parentElement) {
            const style = getComputedStyle(item), colour = rgba(style.backgroundColor);
            if (style.backgroundImage !== "none") return null;
            if (colour[3]) layers.push(colour);
            if (colour[3] === 1) break;
        }
        return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    };
    const light = (colour) => {
        const [r, g, b] = colour.map((part) => part / 255)
            .map((part) => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.getElementById("i2l"), NodeFilter.SHOW_TEXT);
    let seen = 0;
    while (walker.nextNode()) {
        const text = walker.currentNode.nodeValue.trim(), item = walker.currentNode.parentElement;
        if (!text || !item.getClientRects().length) continue;
        if (item.closest("#i2l_hidden, .i2l-unseen, svg, :disabled")) continue;
        const style = getComputedStyle(item), back = behind(item);
        if (style.visibility === "hidden" || +style.opacity < 1 || !back) continue;
        const [one, other] = [light(over(rgba(style.color), back)), light(back)].sort((a, b) => b - a);
        const ratio = (one + .05) / (other + .05);
        seen += 1;
        if (ratio < 4.5) found.push([text.slice(0, 40), ratio.toFixed(2), style.color, back.join(), item.className]);
    }
    return {seen, found};
}"""
"""Texts of less than 4.5:1 against what lies behind them; and how many were measured."""

NAMELESS = """() => ["button", "input", "select", "textarea"]
    .flatMap((kind) => [...document.querySelectorAll("#i2l " + kind)])
    .filter((item) => item.getClientRects().length && !item.closest("#i2l_hidden"))
    .filter((item) => !(item.textContent.trim() || item.title || item.getAttribute("aria-label") || item.placeholder
        || (item.labels && [...item.labels].some((label) => label.textContent.trim())) || item.closest("label")
        || item.getAttribute("aria-labelledby")))
    .map((item) => item.outerHTML.slice(0, 120))"""
"""Controls that a screen reader has no name for."""

OUTSIDE = """() => {
    const found = [], edge = document.documentElement.clientWidth, whole = document.documentElement.scrollWidth;
    if (whole > edge) found.push(["the page", whole, edge]);
    const scrolls = (item) => item && item.id !== "i2l"
        && (["auto", "scroll"].includes(getComputedStyle(item).overflowX) || scrolls(item.parentElement));
    for (const item of document.querySelectorAll("#i2l *")) {
        if (!item.getClientRects().length) continue;
        if (item.closest("#i2l_hidden, .i2l-unseen, svg, .tab-nav, [role=tablist]")) continue;
        const box = item.getBoundingClientRect(), style = getComputedStyle(item);
        if (!box.width || style.visibility === "hidden" || scrolls(item)) continue;
        const cut = style.overflowX === "visible" ? 0 : item.scrollWidth - item.clientWidth;
        if (box.right > edge + 1 || box.left < -1) found.push([item.outerHTML.slice(0, 160), box.left, box.right]);
        else if (cut > 2 && /i2l-/.test(item.className)) found.push(["cut: " + item.outerHTML.slice(0, 160), cut]);
    }
    return found;
}"""
"""What is wider than the window, or cut off where nothing scrolls."""

NARROW = """() => [...document.querySelectorAll("#i2l :is(b, p, h3, h4, dd, span, summary, code)")]
    .filter((item) => item.getClientRects().length && !item.closest("#i2l_hidden, .i2l-unseen, svg"))
    .filter((item) => {
        const text = item.textContent.trim(), isWord = text.length <= 16 && !/[\\s-]/.test(text);
        const range = document.createRange();
        range.selectNodeContents(item);
        const box = range.getBoundingClientRect(), size = parseFloat(getComputedStyle(item).fontSize);
        const broken = isWord && box.height > 2.4 * size;
        return broken || (text.length > 12 && box.width < 4 * size && box.height > 3 * size);
    })
    .map((item) => item.outerHTML.slice(0, 160))"""
"""Texts that wrap every few letters, and short words on two lines."""

UNFOCUSED = """() => {
    const still = document.createElement("style");
    still.textContent = "* { transition: none !important; }";
    document.head.append(still);
    const looks = (item) => {
        const told = [];
        for (let n = 0; item && item.id !== "i2l" && n < 5; n++, item = item.parentElement) {
            const style = getComputedStyle(item);
            const line = style.outlineStyle !== "none" && parseFloat(style.outlineWidth);
            told.push([line ? style.outlineColor + style.outlineWidth : "", style.boxShadow, style.borderColor].join());
        }
        return told.join("|");
    };
    const found = [], kinds = "#i2l :is(button, input, select, textarea, summary, [tabindex='0'])";
    for (const item of document.querySelectorAll(kinds)) {
        if (!item.getClientRects().length || item.disabled || item.closest("#i2l_hidden")) continue;
        document.activeElement.blur();
        const before = looks(item);
        item.focus({preventScroll: true, focusVisible: true});
        if (document.activeElement === item && looks(item) === before) found.push(item.outerHTML.slice(0, 160));
    }
    document.activeElement.blur();
    still.remove();
    return found;
}"""
"""Controls that look the same with the keyboard on them."""
