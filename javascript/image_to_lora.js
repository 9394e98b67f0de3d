// The tab's few lines of script: what the page gathers goes into one hidden box, and a hidden button asks how the
// jobs stand. Works alike in every host; nothing is loaded from anywhere.
(function () {
    "use strict";
    if (window.imageToLora) return;
    window.imageToLora = true;

    const FAST = 500, SLOW = 4000;
    const find = (selector, root) => (root || document).querySelector(selector);
    const all = (selector) => Array.from(document.querySelectorAll(selector));
    const root = (id) => document.getElementById(id);
    const translated = (text) => (window.localization && window.localization[text]) || text;
    let asked = 0, first = true, lost = false, fresh = new Set();

    function box(id) {
        const place = root(id);
        return place && find("textarea, input", place);
    }

    function write(field, text) {
        if (!field || field.value === text) return;
        field.value = text;
        field.dispatchEvent(new Event("input", {bubbles: true}));
    }

    function press(id) {
        const place = root(id);
        const button = place && (place.matches("button") ? place : find("button", place));
        if (button) button.click();
    }

    function gather() {
        if (!root("i2l_form")) return;
        const weight = (card) => {
            const number = parseFloat(find("input", card).value);
            return number > 0 ? number : 1;
        };
        const pictures = all("#i2l_tray .i2l-card").map((card) => [card.dataset.i2lId, weight(card)]);
        const model = find('#i2l_models input[name="i2l_model"]:checked');
        write(box("i2l_form"), JSON.stringify({pictures: pictures, model: model ? model.value : ""}));
    }

    function insert(text, where) {
        const prompt = find("#" + where + "_prompt textarea");
        if (!prompt) return;
        if (!prompt.value.includes(text)) write(prompt, (prompt.value.trim() + " " + text).trim());
        open(where);
    }

    function open(where) {
        const titles = {txt2img: "txt2img", img2img: "img2img"};
        const tab = all("#tabs > .tab-nav button, #tabs > div > .tab-container button, #tabs > div button[role=tab]")
            .find((button) => button.textContent.trim() === translated(titles[where]) ||
                              button.textContent.trim() === titles[where]);
        if (tab) tab.click();
    }

    function copy(text, button) {
        const done = () => {
            const before = button.innerHTML;
            button.textContent = translated("Copied");
            setTimeout(() => { button.innerHTML = before; }, 1200);
        };
        const fallback = () => {
            const area = document.createElement("textarea");
            area.value = text;
            document.body.appendChild(area);
            area.select();
            document.execCommand("copy");
            area.remove();
            done();
        };
        if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, fallback);
        else fallback();
    }

    const actions = {
        remove: (item) => { item.closest(".i2l-card").remove(); gather(); },
        copy: (item) => copy(item.dataset.i2lText, item),
        insert: (item) => insert(item.dataset.i2lText, item.dataset.i2lTarget),
        open: () => {
            open("txt2img");
            const tab = all("#txt2img_extra_tabs button").find((button) => button.textContent.trim() === "Lora");
            if (tab) tab.click();
        },
        cancel: (item) => {
            write(box("i2l_target"), item.dataset.i2lJob);
            setTimeout(() => press("i2l_cancel"), 30);
        },
    };

    document.addEventListener("click", (event) => {
        const target = event.target instanceof Element ? event.target : null;
        const item = target && target.closest("[data-i2l]");
        if (item && actions[item.dataset.i2l]) actions[item.dataset.i2l](item);
        if (target && target.closest("#i2l_make, #i2l_export, #i2l_inspect, #i2l_convert, #i2l_curve, #i2l_download, #i2l_verify")) {
            gather();
            asked = Date.now() - SLOW + 200;
        }
    }, true);
    document.addEventListener("input", (event) => {
        if (event.target.closest && event.target.closest("#i2l_tray, #i2l_models")) gather();
    }, true);
    document.addEventListener("paste", (event) => {
        const drop = find('#i2l_files input[type="file"]');
        const files = Array.from((event.clipboardData || {}).files || []).filter((file) => file.type.startsWith("image/"));
        if (!drop || !files.length || !shown()) return;
        const carrier = new DataTransfer();
        files.forEach((file) => carrier.items.add(file));
        drop.files = carrier.files;
        drop.dispatchEvent(new Event("change", {bubbles: true}));
        event.preventDefault();
    });

    function shown() {
        const place = root("i2l_panes");
        return place && place.offsetParent !== null;
    }

    function tips() {
        all("#i2l_tips [data-i2l-for]").forEach((tip) => {
            const place = root(tip.dataset.i2lFor);
            if (!place || place.dataset.i2lTip) return;
            place.dataset.i2lTip = "1";
            place.title = translated(tip.textContent);
            const input = place.matches("button") ? place : find("input, textarea, button", place);
            if (input) input.setAttribute("aria-description", place.title);
        });
    }

    function news() {
        all("[data-i2l-made]").forEach((made) => {
            if (fresh.has(made.dataset.i2lId)) return;
            fresh.add(made.dataset.i2lId);
            press("txt2img_lora_extra_refresh_internal");
            press("img2img_lora_extra_refresh_internal");
        });
    }

    function ask() {
        const jobs = root("i2l_jobs");
        const busy = jobs && jobs.dataset.active === "1";
        const now = Date.now();
        if (!root("i2l_poll") || document.hidden || (!first && !busy && !shown())) return;
        if (!first && now - asked < (busy && !lost ? FAST : SLOW)) return;
        asked = now;
        fetch(location.pathname, {method: "HEAD", cache: "no-store"}).then(() => true, () => false).then((there) => {
            lost = !there;
            const notice = root("i2l_lost");
            if (notice) notice.hidden = there;
            if (there) { first = false; press("i2l_poll"); }
        });
    }

    setInterval(() => { gather(); tips(); news(); ask(); }, 200);
})();
