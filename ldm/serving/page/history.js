// The images that were made, kept in this browser.

const MOST = 100;

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("ldm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, use) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const change = database.transaction("images", mode);
      const result = use(change.objectStore("images"));
      change.oncomplete = () => resolve(result && result.result);
      change.onerror = () => reject(change.error);
    });
  } finally {
    database.close();
  }
}

// Entries are {blob, seed, settings}; the newest is first.
export async function all() {
  try {
    return (await run("readonly", (store) => store.getAll())).reverse();
  } catch {
    return []; // private windows may have no database
  }
}

export async function add(entry) {
  try {
    await run("readwrite", (store) => store.add(entry));
    const old = (await all()).slice(MOST);
    if (old.length) await run("readwrite", (store) => { old.forEach((each) => store.delete(each.id)); });
  } catch { /* the history is a convenience */ }
}

export async function clear() {
  await run("readwrite", (store) => store.clear());
}
