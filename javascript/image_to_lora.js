// The script of the tab. What the page gathers goes into one hidden box, and a hidden button polls the jobs. It works
// alike in every host and loads nothing.
(function () {
    "use strict";
    if (window.imageToLora) return;
    window.imageToLora = true;

    const FAST = 500, SLOW = 4000, PATIENCE = 20000, AGAIN = 2000;
    const find = (selector, root = document) => root.querySelector(selector);
    const all = (selector) => Array.from(document.querySelectorAll(selector));
    const root = (id) => document.getElementById(id);
    const base = () => location.pathname.replace(/\/$/, "");
    const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));
    const dropped = {};
    let asked = 0, first = true, lost = false, fresh = new Set(), turn = 0, uploads = Promise.resolve(), sending = 0, eager = false;
    let asking = false, picked = "", held = "";
    let greeted = 0, named = 0, handed = 0, questions = 0;
    const asks = [], me = Math.random().toString(36).slice(2);
    const DISMISSED = "i2l-dismissed";
    const dismissed = recall();

    // What was dismissed stays so when the page is opened again; without storage, as long as it is open.
    function recall() {
        try {
            const kept = JSON.parse(localStorage.getItem(DISMISSED));
            return Array.isArray(kept) ? kept.slice(-100) : [];
        } catch (error) {
            return [];
        }
    }

    function remember() {
        try {
            localStorage.setItem(DISMISSED, JSON.stringify(dismissed.slice(-100)));
        } catch (error) { /* no storage */ }
    }

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

    function typed(id) {
        const field = box(id);
        return field ? field.value : "";
    }

    // A share that is no number greater than 0 is sent as it is: the answer says what is wrong, and so does the page.
    function share(card) {
        const input = find("input", card), number = parseFloat(input.value);
        const good = number > 0 && Number.isFinite(number);
        if (good) input.removeAttribute("aria-invalid");
        else input.setAttribute("aria-invalid", "true");
        return Number.isFinite(number) ? number : null;
    }

    function group(item) {
        const cards = Array.from(item.querySelectorAll(".i2l-card"));
        return {name: find("input[type=text]", item).value, pictures: cards.map((card) => card.dataset.i2lId)};
    }

    function gather() {
        if (!root("i2l_form")) return;
        const pictures = all("#i2l_tray .i2l-card").map((card) => [card.dataset.i2lId, share(card)]);
        const wrong = root("i2l_share_wrong");
        if (wrong) wrong.hidden = !find('#i2l_tray [aria-invalid="true"]');
        const model = find('#i2l_models input[name="i2l_model"]:checked');
        const rank = find('#i2l_train_rank input[type="number"]');
        write(box("i2l_form"), JSON.stringify({
            pictures: pictures, model: model ? model.value : "", dropped: dropped.inspect_drop || "",
            rank: rank ? parseFloat(rank.value) : null, picked: picked, name: typed("i2l_name"),
            subfolder: typed("i2l_subfolder"), dismissed: dismissed, groups: all("#i2l_groups .i2l-group").map(group),
        }));
    }

    // The named fields around a button, for its action: {name: [values]}.
    function fields(item) {
        const around = item.closest("[data-i2l-fields]"), told = {};
        if (!around) return told;
        for (const field of around.querySelectorAll('input:checked, input[type="number"], input[type="search"], select')) {
            (told[field.name] = told[field.name] || []).push(field.value);
        }
        return told;
    }

    // Files go to gradio's own upload route, beside its component: in gradio 3.41 that one forgets an upload when
    // anything on the page is updated meanwhile.
    async function send(file) {
        const prefix = (window.gradio_config && window.gradio_config.api_prefix) || "";
        const form = new FormData();
        form.append("files", file);
        const answer = await fetch(base() + prefix + "/upload", {method: "POST", body: form});
        if (!answer.ok) throw new Error(String(answer.status));
        return (await answer.json())[0];
    }

    function queue(does) {
        sending += 1;
        uploads = uploads.then(does).catch(console.error).finally(() => { sending -= 1; });
        return uploads;
    }

    // The cards of the tray are drawn anew; a job that is asked for meanwhile waits for it.
    window.imageToLoraTray = {redraw: () => queue(() => take({paths: []}, "i2l_take", "#i2l_tray"))};

    // If the button is pressed while pictures are uploading, the job starts after the last of them.
    function afterUploads(button) {
        if (eager) return;
        eager = true;
        uploads.then(() => { eager = false; button.click(); });
    }

    async function upload(id, files) {
        const zone = find('[data-i2l-drop="' + id + '"]');
        const busy = find("em", zone), refused = find(".i2l-error", zone);
        refused.hidden = true;
        busy.hidden = false;
        try {
            const paths = [];
            for (const file of files) {
                find("i", busy).textContent = (paths.length + 1) + " / " + files.length;
                paths.push(await send(file));
            }
            if (id === "files") await take({paths: paths}, "i2l_take", "#i2l_tray");
            else if (zone.closest("#i2l_batch_files, #i2l_groups")) {
                const place = all("#i2l_groups .i2l-group").indexOf(zone.closest(".i2l-group"));
                await take({paths: paths, group: place + 1}, "i2l_take_group", "#i2l_groups");
            } else drop(zone, id, files[0].name, paths[0]);
        } catch (error) {
            refused.hidden = false;
        } finally {
            busy.hidden = true;
        }
    }

    async function take(sent, button, place) {
        turn += 1;
        gather();
        write(box("i2l_uploaded"), JSON.stringify({...sent, turn: turn}));
        await wait(50);
        press(button);
        for (let n = 0; n < 1200 && !find(place + ' [data-i2l-turn="' + turn + '"]'); n++) await wait(100);
        gather();
    }

    function drop(zone, id, name, path) {
        dropped[id] = path;
        let shown = find(".i2l-dropped", zone.parentElement);
        if (!shown) {
            shown = document.createElement("p");
            shown.className = "i2l-dropped";
            zone.after(shown);
        }
        const button = document.createElement("button");
        button.type = "button";
        button.className = "i2l-button";
        button.dataset.i2l = "undrop";
        button.dataset.i2lTarget = id;
        button.title = "Remove";
        button.textContent = "×";
        shown.replaceChildren(name, button);
        gather();
    }

    function copy(text, button) {
        const done = () => {
            const before = button.innerHTML;
            button.textContent = "Copied";
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

    // gradio drops a press while the answer to the last one is out. So what is asked waits, and is asked again, until the
    // page is told that it was heard.
    function ask(told) {
        asks.push({...told, ask: me + (questions += 1)});
        hand();
    }

    function hand() {
        if (asks.length && asks[0].ask === (find("[data-i2l-taken]") || {dataset: {}}).dataset.i2lTaken) {
            asks.shift();
            handed = 0;
        }
        if (!asks.length || lost || Date.now() - handed < AGAIN) return;
        handed = Date.now();
        write(box("i2l_target"), JSON.stringify(asks[0]));
        setTimeout(() => press("i2l_act"), 50);
    }

    const actions = {
        remove: (item) => { item.closest(".i2l-card").remove(); gather(); },
        remove_group: (item) => { item.closest(".i2l-group").remove(); gather(); },
        copy: (item) => copy(item.dataset.i2lText, item),
        insert: (item) => window.imageToLoraHost.insert(item.dataset.i2lText, item.dataset.i2lTarget),
        open: () => window.imageToLoraHost.openLoras(),
        undrop: (item) => { delete dropped[item.dataset.i2lTarget]; item.parentElement.remove(); gather(); },
        cancel: (item) => { ask({action: "cancel", job: item.dataset.i2lJob}); soon(300); },
        act: (item) => {
            const told = JSON.parse(item.dataset.i2lText);
            ask({...told, fields: fields(item)});
            if (item.dataset.i2lTarget) goto(item.dataset.i2lTarget);
            soon(300);
        },
        goto: (item) => goto(item.dataset.i2lTarget),
        dismiss: (item) => {
            dismissed.push(item.dataset.i2lText);
            remember();
            item.closest(".i2l-job").remove();
            gather();
        },
        rename: (item) => write(box("i2l_name"), item.dataset.i2lText),
    };

    function soon(time) {
        asked = Date.now() - SLOW + time;
    }

    function goto(pane) {
        const panes = all('#i2l_panes > [id^="i2l_pane_"], #i2l_panes > div > [id^="i2l_pane_"]');
        const buttons = all("#i2l_panes > .tab-nav > button");
        const button = root("i2l_pane_" + pane + "-button") || buttons[panes.findIndex((one) => one.id === "i2l_pane_" + pane)];
        if (button) button.click();
        const place = root("i2l_panes");
        if (place && place.getBoundingClientRect().top < 0) place.scrollIntoView();
    }

    document.addEventListener("click", (event) => {
        const target = event.target instanceof Element ? event.target : null;
        const item = target && target.closest("[data-i2l]");
        const make = target && target.closest("#i2l_make, #i2l_each_of_groups");
        if (make && sending) {
            event.stopImmediatePropagation();
            event.preventDefault();
            afterUploads(target.closest("button") || make);
            return;
        }
        if (item && actions[item.dataset.i2l]) actions[item.dataset.i2l](item);
        if (target && target.closest("#i2l_make, #i2l_export, #i2l_inspect, #i2l_convert, #i2l_curve, #i2l_doctor, #i2l_each_of_folder, #i2l_each_of_tray, #i2l_each_of_groups")) {
            gather();
            soon(200);
        }
    }, true);
    document.addEventListener("input", (event) => {
        if (event.target.name === "i2l_model") picked = event.target.value;
        if (event.target.closest && event.target.closest("#i2l_tray, #i2l_groups, #i2l_models, #i2l_name, #i2l_subfolder")) gather();
    }, true);
    document.addEventListener("change", (event) => {
        const zone = event.target.closest && event.target.closest("[data-i2l-drop]");
        const files = zone ? Array.from(event.target.files) : [];
        if (!files.length) return;
        event.target.value = "";
        const id = zone.dataset.i2lDrop;
        queue(() => upload(id, files));
    }, true);
    document.addEventListener("paste", (event) => {
        const files = Array.from((event.clipboardData || {}).files || []).filter((file) => file.type.startsWith("image/"));
        if (!files.length || !shown("i2l_files")) return;
        event.preventDefault();
        queue(() => upload("files", files));
    });
    for (const kind of ["dragenter", "dragleave", "drop"]) {
        document.addEventListener(kind, (event) => {
            const zone = event.target.closest && event.target.closest("[data-i2l-drop]");
            if (zone) zone.classList.toggle("i2l-over", kind === "dragenter");
        }, true);
    }

    function shown(id) {
        const place = root(id);
        return place && place.offsetParent !== null;
    }

    function tips() {
        all("#i2l_tips [data-i2l-for]").forEach((tip) => {
            const place = root(tip.dataset.i2lFor);
            if (!place || place.dataset.i2lTip) return;
            place.dataset.i2lTip = "1";
            place.title = tip.textContent;
            const input = place.matches("button") ? place : find("input, textarea, button", place);
            if (input) input.setAttribute("aria-description", place.title);
        });
    }

    // In gradio 3 what folds a part of the page away is no button, and the number beside a slider has no name.
    function reachable() {
        all('#i2l .block input[type="number"]:not([aria-label]):not([aria-labelledby])').forEach((field) => {
            const title = find('[data-testid="block-info"]', field.closest(".block"));
            if (!title || field.labels.length) return;
            title.id = title.id || "i2l_title_" + (named += 1);
            field.setAttribute("aria-labelledby", title.id);
        });
        all("#i2l div.label-wrap").forEach((fold) => {
            fold.tabIndex = 0;
            fold.setAttribute("role", "button");
            fold.setAttribute("aria-expanded", fold.classList.contains("open"));
        });
    }

    document.addEventListener("keydown", (event) => {
        const fold = event.target;
        if (![" ", "Enter"].includes(event.key) || !fold.matches || !fold.matches("#i2l div.label-wrap")) return;
        event.preventDefault();
        fold.click();
    });

    const EMPTY = ["error", "repaired", "result", "activity", "offer", "fetched"].map((end) => `#i2l [id^="i2l_"][id$="_${end}"]`);

    function tidy() {
        all(EMPTY.concat("#i2l_activity, #i2l_saved_as, #i2l_train_curve").join()).forEach((block) => {
            const shown = find(".prose", block) || block;  // gradio 3 has times of its own around it
            block.style.display = shown.textContent.trim() || find("img", shown) ? "" : "none";
        });
    }

    // Once for each: the host's cards are refreshed, a LoRA that was dropped gives way to the one that was made, a
    // button is pressed that was to follow, and what ended is said to those who do not see it.
    function once(mark, does) {
        all("[" + mark + "]").forEach((item) => {
            const key = mark + item.dataset.i2lId;
            if (fresh.has(key)) return;
            fresh.add(key);
            does(item);
        });
    }

    function news() {
        if (!greeted && find("#i2l_models input")) greeted = Date.now();
        const early = !greeted || Date.now() - greeted < SLOW;  // what was there when the page opened is no news
        once("data-i2l-made", (made) => {
            window.imageToLoraHost.refresh();
            if (!early && made.dataset.i2lMade === "new") all(".i2l-dropped [data-i2l=undrop]").forEach((item) => item.click());
        });
        once("data-i2l-card", (item) => window.imageToLoraCrop.open(item));
        once("data-i2l-then", (item) => press(item.dataset.i2lThen));
        once("data-i2l-said", (item) => {
            const place = root("i2l_said");
            if (place && !early) place.textContent = item.dataset.i2lSaid;
        });
    }

    // What a poll draws anew keeps the keyboard's place.
    const keyOf = (item) => ["i2l", "i2lJob", "i2lText", "i2lTarget"].map((name) => item.dataset[name] || "").join("|");

    document.addEventListener("focusin", (event) => {
        held = event.target.matches("#i2l [data-i2l]") ? keyOf(event.target) : "";
    });

    function keepFocus() {
        if (!held || (document.activeElement && document.activeElement !== document.body)) return;
        const again = all("#i2l button[data-i2l]").find((item) => keyOf(item) === held);
        if (again) again.focus({preventScroll: true});
    }

    // Asked before the hidden button is pressed: without an answer, gradio would show an alert at each press.
    async function isThere() {
        const stop = new AbortController();
        const late = setTimeout(() => stop.abort(), PATIENCE);
        try {
            return (await fetch(base() + "/i2l/alive", {cache: "no-store", signal: stop.signal})).status < 500;
        } catch (error) {
            return false;
        } finally {
            clearTimeout(late);
        }
    }

    function poll() {
        const jobs = root("i2l_jobs");
        const busy = jobs && jobs.dataset.active === "1";
        const now = Date.now();
        if (asking || !root("i2l_poll") || document.hidden || (!first && !busy && !shown("i2l_panes"))) return;
        if (!first && now - asked < (busy && !lost ? FAST : SLOW)) return;
        asked = now;
        asking = true;
        isThere().then((there) => {
            asking = false;
            lost = !there;
            const notice = root("i2l_lost");
            if (notice) notice.hidden = there;
            if (there) { first = false; press("i2l_poll"); }
        });
    }

    // At once: a key that is pressed between a redraw and the next turn of the clock would be lost.
    new MutationObserver(keepFocus).observe(document, {childList: true, subtree: true});
    setInterval(() => { gather(); tips(); reachable(); tidy(); news(); hand(); poll(); }, 200);
})();
