// Shift and a click on a LoRA's card, or on a button that inserts one, puts <i2l:...> into the prompt instead of
// <lora:...>: the LoRA on the positive branch of guidance only. Forge Neo reads it.
(function () {
    const PROMPTS = ["#txt2img_prompt textarea", "#img2img_prompt textarea"];

    function prompts() {
        const root = typeof gradioApp === "function" ? gradioApp() : document;
        return PROMPTS.map((selector) => root.querySelector(selector)).filter(Boolean);
    }

    function rewrite(prompt, before) {
        if (!prompt.value.startsWith(before)) return;
        const added = prompt.value.slice(before.length);
        if (!added.includes("<lora:")) return;
        prompt.value = before + added.replaceAll("<lora:", "<i2l:");
        prompt.dispatchEvent(new Event("input", { bubbles: true }));
    }

    document.addEventListener("click", (event) => {
        if (!event.shiftKey) return;
        for (const prompt of prompts()) {
            const before = prompt.value.trimEnd();
            setTimeout(() => rewrite(prompt, before), 0); // what was clicked writes first
        }
    }, true);
})();
