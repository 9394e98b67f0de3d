// What the tab does in the WebUI around it: its prompts, its tabs, its cards of LoRAs. Parts are found by their ids, which
// are the same in every language and theme. A WebUI without one of them is left as it is.
(function () {
    "use strict";
    if (window.imageToLoraHost) return;

    const PATIENCE = 20000;
    const PLACES = ["txt2img", "img2img"];
    const byId = (id) => document.getElementById(id);
    const isVisible = (place) => Boolean(place) && place.offsetParent !== null;
    const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));

    // Gradio 4 gives the button of a tab an id; in gradio 3 it stands where its panel stands among the others.
    function buttonOf(panel) {
        const own = byId(panel.id + "-button");
        if (own) return own;
        const panels = Array.from(panel.parentElement.children).filter((one) => one.classList.contains("tabitem"));
        const buttons = panel.parentElement.querySelectorAll(":scope > .tab-nav > button");
        return buttons.length === panels.length ? buttons[panels.indexOf(panel)] : null;
    }

    function openPanel(id) {
        const panel = byId(id), button = panel && buttonOf(panel);
        if (button) button.click();
    }

    function titled(root, title) {
        return Array.from(root ? root.querySelectorAll("button") : []).find((one) => one.textContent.trim() === title);
    }

    // Resolves when something in a place was exchanged, or after PATIENCE.
    function exchanged(place) {
        return new Promise((resolve) => {
            const observer = new MutationObserver(() => { observer.disconnect(); resolve(wait(300)); });
            observer.observe(place, {childList: true, subtree: true});
            setTimeout(() => { observer.disconnect(); resolve(); }, PATIENCE);
        });
    }

    // One after the other: each empties and fills the WebUI's one dictionary of LoRAs, which has no lock.
    async function refreshCards() {
        for (const where of PLACES) {
            const button = byId(where + "_lora_extra_refresh_internal"), shown = byId(where + "_extra_tabs");
            if (!button || !shown) continue;
            const done = exchanged(shown);
            button.click();
            await done;
        }
    }

    // SD.Next's modern theme and UI-UX have a navigation of their own, into whose places they move the parts of the page.
    // Where SD.Next hides txt2img and img2img, "Images" does the work of both.
    const entryOf = (where) => byId(where + "_nav");

    function placeOf(where) {
        return entryOf(where) && !isVisible(entryOf(where)) && byId("control_prompt") ? "control" : where;
    }

    function openPlace(where) {
        const entry = entryOf(where);
        if (entry) entry.click();
        else openPanel("tab_" + where);
    }

    async function openNetworksAside(where) {
        const listed = byId("layout-extra-networks"), entry = byId("btn_extra_networks");
        await wait(100);  // the list of this place comes with it
        if (!isVisible(listed) && entry) entry.click();
        showLoras(where);
    }

    async function showLoras(where) {
        const tab = titled(byId(where + "_extra_tabs"), "Lora");
        if (!tab) return;
        tab.click();
        await wait(500);
        const again = byId(where + "_extra_refresh");
        if (again) again.click();
    }

    // SD.Next: the networks are a part of the page that a button opens, and are listed anew where they are looked at.
    async function openNetworks(where) {
        if (!isVisible(byId(where + "_extra_networks"))) byId(where + "_extra_networks_btn").click();
        for (let n = 0; n < 50 && !isVisible(byId(where + "_extra_networks")); n++) await wait(100);
        await showLoras(where);
    }

    let refreshing = Promise.resolve(), isWaiting = false;

    window.imageToLoraHost = {
        // Put a text into the prompt of txt2img or img2img, unless it is there, and show that tab.
        insert(text, named) {
            const where = placeOf(named);
            const prompt = document.querySelector("#" + where + "_prompt textarea");
            if (!prompt) return;
            if (!prompt.value.includes(text)) {
                prompt.value = (prompt.value.trim() + " " + text).trim();
                prompt.dispatchEvent(new Event("input", {bubbles: true}));
            }
            openPlace(where);
        },
        // Show the cards of LoRAs.
        openLoras() {
            const where = placeOf(PLACES[0]);
            openPlace(where);
            if (entryOf("lora")) entryOf("lora").click();  // UI-UX lists them beside the page
            else if (entryOf(where)) openNetworksAside(where).catch(console.error);
            else if (byId(where + "_extra_networks_btn")) openNetworks(where).catch(console.error);
            else openPanel(where + "_lora");
            const tab = entryOf(where) ? null : titled(byId(where + "_extra_tabs"), "Lora");
            if (tab && !isVisible(byId(where + "_lora"))) tab.click();
        },
        // LoRAs were added: show their cards too.
        refresh() {
            if (isWaiting) return;
            isWaiting = true;
            refreshing = refreshing.then(() => { isWaiting = false; return refreshCards(); }).catch(console.error);
        },
    };
})();
