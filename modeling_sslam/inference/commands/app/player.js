// Moves the cursor over the picture during playback, and moves playback to where the picture is clicked.
// The script runs once. Each result replaces the content of `element` but not `element` itself, so the listeners are
// on `element`. Media events do not bubble: the listeners catch them in the capture phase.
const find = (selector) => element.querySelector(selector);

function place() {
  const [audio, cursor] = [find("audio"), find(".cursor")];
  if (!audio || !cursor) return;
  const { left, right, duration } = find(".picture").dataset;
  const share = Math.min(1, audio.currentTime / Number(duration));
  cursor.style.left = `${100 * (Number(left) + (right - left) * share)}%`;
}

function follow() {
  const audio = find("audio");
  if (!audio) return;
  place();
  const frame = find(".frame");
  // A picture that is wider than the window scrolls with the sound.
  frame.scrollLeft = find(".cursor").offsetLeft - frame.clientWidth / 2;
  if (!audio.paused && !audio.ended) requestAnimationFrame(follow);
}

element.addEventListener("play", follow, true);
element.addEventListener("seeking", place, true);
element.addEventListener("timeupdate", place, true);
element.addEventListener("error", (event) => {
  if (event.target.matches("audio")) find(".unplayable").hidden = false;
}, true);
element.addEventListener("click", (event) => {
  const picture = event.target.closest(".picture");
  if (!picture) return;
  const { left, right, duration } = picture.dataset;
  const box = picture.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - left) / (right - left);
  find("audio").currentTime = Math.max(0, Math.min(1, share)) * duration;
});
