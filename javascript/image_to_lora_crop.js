// Which squares of a picture are taken. The dialog comes from the server with the whole picture; its squares are the
// tray's cards of that picture, and become them again. All numbers are pixels of the picture itself.
(function () {
    "use strict";
    if (window.imageToLoraCrop) return;

    const SMALLEST = 32, STEP = 0.01, LARGE = 10, GROWTH = 1.06;
    const find = (selector, root = document) => root.querySelector(selector);
    const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
    const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

    let listening = null;

    class Crop {
        constructor(dialog) {
            this.dialog = dialog;
            this.stage = find(".i2l-stage", dialog);
            this.zoom = find('input[type="range"]', dialog);
            this.upload = dialog.dataset.i2lUpload;
            this.width = Number(dialog.dataset.i2lWidth);
            this.height = Number(dialog.dataset.i2lHeight);
            this.short = Math.min(this.width, this.height);
            this.smallest = Math.min(this.short, SMALLEST);
            this.pointers = new Map();
            this.squares = this.cards().map((card) => ({...this.squareOf(card.dataset.i2lId), card: card}));
            if (!this.squares.length) this.squares.push(this.centre());
            this.active = Math.max(0, this.cards().findIndex((card) => card.dataset.i2lId === dialog.dataset.i2lCard));
            // Some gradios keep the elements of the last dialog: what was drawn and heard there ends with it.
            if (listening) listening.abort();
            listening = this.ended = new AbortController();
            all(".i2l-square", this.stage).forEach((item) => item.remove());
            this.listen();
            dialog.showModal();
            this.draw();
            this.focus();
        }

        cards() {
            return all("#i2l_tray .i2l-card").filter((card) => card.dataset.i2lId.split("@")[0] === this.upload);
        }

        centre() {
            const side = this.short;
            return {left: Math.floor((this.width - side) / 2), top: Math.floor((this.height - side) / 2), side: side};
        }

        squareOf(id) {
            const told = (id.split("@")[1] || "").split(",").map(Number);
            return told.length === 3 ? {left: told[0], top: told[1], side: told[2]} : this.centre();
        }

        idOf(square) {
            const middle = this.centre();
            if (["left", "top", "side"].every((name) => square[name] === middle[name])) return this.upload;
            return this.upload + "@" + [square.left, square.top, square.side].join(",");
        }

        get now() { return this.squares[this.active]; }

        // Whole pixels inside the picture; what is dragged beyond its edge stops there.
        place(left, top, side) {
            const square = this.now;
            square.side = clamp(Math.round(side), this.smallest, this.short);
            square.left = clamp(Math.round(left), 0, this.width - square.side);
            square.top = clamp(Math.round(top), 0, this.height - square.side);
            this.draw();
        }

        // About the middle of the square.
        resize(side) {
            const {left, top, side: before} = this.now, size = clamp(Math.round(side), this.smallest, this.short);
            this.place(left + (before - size) / 2, top + (before - size) / 2, size);
        }

        step(factor) {
            const before = this.now.side, side = before * factor;
            this.resize(Math.round(side) === before ? before + Math.sign(factor - 1) : side);
        }

        // Beside the others: where its middle is farthest from theirs.
        add() {
            if (this.full()) return;
            const side = this.short * 1.25 <= Math.max(this.width, this.height) ? this.short : Math.ceil(this.short / 2);
            const places = [], far = (place, other) => Math.hypot(
                place.left + side / 2 - other.left - other.side / 2, place.top + side / 2 - other.top - other.side / 2);
            for (let x = 0; x <= 8; x++) for (let y = 0; y <= 8; y++) {
                const place = {left: Math.round((this.width - side) * x / 8), top: Math.round((this.height - side) * y / 8)};
                places.push([Math.min(...this.squares.map((other) => far(place, other))), place]);
            }
            const [, best] = places.reduce((one, other) => (other[0] > one[0] ? other : one));
            this.squares.push({...best, side: side});
            this.choose(this.squares.length - 1);
        }

        remove() {
            if (this.squares.length < 2) return;
            this.squares.splice(this.active, 1);
            this.choose(Math.min(this.active, this.squares.length - 1));
        }

        full() {
            const others = all("#i2l_tray .i2l-card").length - this.cards().length;
            return this.squares.length + others >= Number(this.dialog.dataset.i2lMost);
        }

        choose(index) {
            this.active = index;
            this.draw();
            this.focus();
        }

        focus() {
            const square = all(".i2l-square", this.stage)[this.active];
            if (square) square.focus({preventScroll: true});
        }

        draw() {
            const shown = all(".i2l-square", this.stage);
            shown.slice(this.squares.length).forEach((item) => item.remove());
            this.squares.forEach((square, index) => {
                const item = shown[index] || this.newSquare(index);
                const share = (value, whole) => 100 * value / whole + "%";
                item.style.left = share(square.left, this.width);
                item.style.top = share(square.top, this.height);
                item.style.width = share(square.side, this.width);
                item.style.height = share(square.side, this.height);
                item.setAttribute("aria-pressed", index === this.active ? "true" : "false");
            });
            const {left, top, side} = this.now;
            const told = `${left}, ${top}, ${side} (${this.width} × ${this.height})`;
            const where = find('[role="status"] .i2l-value', this.dialog);
            if (where.textContent !== told) where.textContent = told;
            const range = this.short - this.smallest;
            this.zoom.value = range ? Math.round(1000 * (side - this.smallest) / range) : 1000;
            find('[data-i2l-crop="remove"]', this.dialog).disabled = this.squares.length < 2;
            find('[data-i2l-crop="add"]', this.dialog).disabled = this.full();
        }

        newSquare(index) {
            // No <button>: browsers differ in what of it a pointer presses, and its corners are to be told apart.
            const item = document.createElement("div"), number = document.createElement("b");
            item.tabIndex = 0;
            item.setAttribute("role", "button");
            item.className = "i2l-square";
            item.setAttribute("aria-label", this.dialog.dataset.i2lSquare + " " + (index + 1));
            number.className = "i2l-value";
            number.textContent = index + 1;
            item.append(number);
            for (const corner of ["nw", "ne", "sw", "se"]) {
                const handle = document.createElement("i");
                handle.dataset.i2lCorner = corner;
                item.append(handle);
            }
            this.stage.append(item);
            return item;
        }

        listen() {
            const on = (item, kind, does, options) => item.addEventListener(kind, does.bind(this), {...options, signal: this.ended.signal});
            on(this.stage, "pointerdown", this.press);
            on(this.stage, "pointermove", this.move);
            on(this.stage, "pointerup", this.release);
            on(this.stage, "pointercancel", this.release);
            on(this.stage, "wheel", this.wheel, {passive: false});
            on(this.stage, "focusin", this.focused);
            on(this.dialog, "keydown", this.key);
            on(this.dialog, "click", this.click);
            on(this.zoom, "input", () => {
                this.resize(this.smallest + (this.short - this.smallest) * this.zoom.value / 1000);
            });
        }

        // Where a pointer is, in pixels of the picture.
        at(event) {
            const seen = this.stage.getBoundingClientRect();
            return {
                x: (event.clientX - seen.left) * this.width / seen.width, y: (event.clientY - seen.top) * this.height / seen.height,
                corner: event.target.dataset ? event.target.dataset.i2lCorner : undefined,
            };
        }

        press(event) {
            if (event.button) return;
            event.preventDefault();
            const item = event.target.closest(".i2l-square"), point = this.at(event);
            if (!this.pointers.size && item) this.choose(all(".i2l-square", this.stage).indexOf(item));
            if (!this.pointers.size && !item) {
                this.place(point.x - this.now.side / 2, point.y - this.now.side / 2, this.now.side);
                this.focus();
            }
            this.pointers.set(event.pointerId, point);
            this.stage.setPointerCapture(event.pointerId);
            this.begin(point.corner);
        }

        // What is moved is measured from where it began, so that an edge loses nothing.
        begin(corner) {
            this.start = {...this.now, corner: this.pointers.size > 1 ? undefined : corner, points: [...this.pointers.values()]};
        }

        spread(points) {
            return Math.hypot(points[0].x - points[1].x, points[0].y - points[1].y) || 1;
        }

        move(event) {
            if (!this.pointers.has(event.pointerId)) return;
            this.pointers.set(event.pointerId, this.at(event));
            const points = [...this.pointers.values()], {left, top, side, corner, points: before} = this.start;
            if (points.length > 1) {
                const size = clamp(side * this.spread(points) / this.spread(before), this.smallest, this.short);
                this.place(left + (side - size) / 2, top + (side - size) / 2, size);
                return;
            }
            const x = points[0].x - before[0].x, y = points[0].y - before[0].y;
            if (!corner) {
                this.place(left + x, top + y, side);
                return;
            }
            const west = corner[1] === "w", north = corner[0] === "n";
            const grown = Math.max(west ? -x : x, north ? -y : y);
            const room = Math.min(west ? left + side : this.width - left, north ? top + side : this.height - top);
            const size = clamp(Math.round(side + grown), this.smallest, room);
            this.place(west ? left + side - size : left, north ? top + side - size : top, size);
        }

        release(event) {
            if (this.pointers.delete(event.pointerId) && this.pointers.size) this.begin();
        }

        wheel(event) {
            event.preventDefault();
            this.step(event.deltaY < 0 ? GROWTH : 1 / GROWTH);
        }

        focused(event) {
            const index = all(".i2l-square", this.stage).indexOf(event.target.closest(".i2l-square"));
            if (index >= 0 && index !== this.active) { this.active = index; this.draw(); }
        }

        // A WebUI has shortcuts of its own on the same keys.
        key(event) {
            event.stopPropagation();
            const far = Math.max(1, Math.round(this.short * STEP)) * (event.shiftKey ? LARGE : 1);
            const {left, top, side} = this.now;
            const moves = {ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far]};
            const does = {"+": () => this.step(GROWTH), "=": () => this.step(GROWTH), "-": () => this.step(1 / GROWTH),
                "_": () => this.step(1 / GROWTH), "Delete": () => this.remove(), "Home": () => this.middle()};
            if (!event.target.closest(".i2l-square") || event.ctrlKey || event.metaKey || event.altKey) return;
            if (moves[event.key]) this.place(left + moves[event.key][0], top + moves[event.key][1], side);
            else if (does[event.key]) does[event.key]();
            else return;
            event.preventDefault();
        }

        middle() {
            const {left, top, side} = this.centre();
            this.place(left, top, side);
        }

        click(event) {
            const item = event.target.closest("[data-i2l-crop]");
            const does = {add: this.add, remove: this.remove, centre: this.middle, cancel: this.close, take: this.take};
            if (item) does[item.dataset.i2lCrop].call(this);
        }

        close() { this.dialog.close(); }

        // The tray has a card for each square from now on; the server draws them.
        async take() {
            this.close();
            const old = this.cards();
            if (!old.length) return;
            const ids = new Set();
            for (const square of this.squares) {
                const id = this.idOf(square);
                if (ids.has(id)) continue;
                ids.add(id);
                const card = (square.card || old[0]).cloneNode(true);
                card.dataset.i2lId = id;
                find("input", card).value = square.card ? find("input", square.card).value : "1";
                old[0].before(card);
            }
            old.forEach((card) => card.remove());
            await window.imageToLoraTray.redraw();
            const first = this.cards()[0];
            if (first) find("[data-i2l=act]", first).focus({preventScroll: true});
        }
    }

    window.imageToLoraCrop = {open: (dialog) => new Crop(dialog)};
})();
