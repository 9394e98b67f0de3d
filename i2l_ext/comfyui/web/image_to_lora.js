// A menu entry that puts the node with the models on the graph, and lists of LoRAs that show a new one at once.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

app.registerExtension({
  name: "image-to-lora",
  commands: [{
    id: "image-to-lora.models",
    label: "i2L models",
    icon: "pi pi-database",
    function: () => {
      const node = LiteGraph.createNode("I2LModels");
      const area = app.canvas.ds.visible_area;
      node.pos = [area[0] + area[2] / 4, area[1] + area[3] / 4];
      app.graph.add(node);
      app.canvas.selectNode?.(node);
    },
  }],
  menuCommands: [{ path: ["Image to LoRA"], commands: ["image-to-lora.models"] }],
  setup() {
    api.addEventListener("executed", (event) => {
      if (event.detail?.output?.i2l_lora) app.refreshComboInNodes?.();
    });
  },
});
