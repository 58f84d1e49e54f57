// What a model can draw, where it can be listed: the nouns of its library, found by a search, and its styles.

const MOST = 30; // nouns that are shown at once

export class Known {
  constructor(box, choose) {
    this.box = box;
    this.find = (id) => box.querySelector(`#known-${id}`);
    this.choose = choose;
    this.nouns = [];
    this.find("search").addEventListener("input", () => this.list());
  }

  show({ nouns, styles }) {
    this.nouns = nouns || [];
    this.box.hidden = !this.nouns.length;
    if (this.box.hidden) return;
    this.find("title").textContent = `What this model can draw: ${this.nouns.length} words and phrases`;
    this.find("styles").textContent = `A style may stand before a thing: ${styles.join(", ")}.`;
    this.list();
  }

  list() {
    const text = this.find("search").value.trim().toLowerCase();
    const found = this.nouns.filter((noun) => noun.includes(text));
    const rank = (noun) => (noun === text ? 0 : noun.startsWith(text) ? 1 : 2);
    found.sort((a, b) => rank(a) - rank(b));
    const items = found.slice(0, MOST).map((noun) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = noun;
      button.onclick = () => this.choose(noun);
      item.append(button);
      return item;
    });
    if (found.length > MOST || !found.length) {
      const rest = document.createElement("li");
      rest.className = "hint";
      rest.textContent = found.length ? `and ${found.length - MOST} more` : "none of this name";
      items.push(rest);
    }
    this.find("list").replaceChildren(...items);
  }
}
