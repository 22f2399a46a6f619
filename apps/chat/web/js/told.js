// What was told of replies that are being written. An answer of the server's may be older than the events that came
// before it; with these it is caught up.
const deltas = new Map(); // message → its deltas, one after the other

export function keep(delta) {
  const known = deltas.get(delta.message);
  const last = known?.at(-1);
  if (last && last.start + last.text.length === delta.start) known.push(delta);
  else deltas.set(delta.message, [delta]);
}

/** What `delta` adds to `text`, which may have some of it; null where something between them is missing. */
export function added(text, delta) {
  return delta.start > text.length ? null : delta.text.slice(text.length - delta.start);
}

/** Give a message what was told of it. Returns false where something before that is missing. */
export function catchUp(message) {
  for (const delta of deltas.get(message.id) || []) {
    const more = added(message.content, delta);
    if (more === null) return false;
    message.content += more;
  }
  return true;
}

export const forget = (message) => deltas.delete(message);
export const forgetAll = () => deltas.clear();
