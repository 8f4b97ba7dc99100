// Forms and buttons send JSON, which a page of another site cannot. The live page receives events.

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body ?? {}),
  });
  if (response.ok) return response;
  const { detail } = await response.json();
  throw new Error(typeof detail === "string" ? detail : detail.map((problem) => problem.msg).join("; "));
}

document.querySelector("#company").addEventListener("submit", async (event) => {
  event.preventDefault();
  await post("/company", { company: event.target.elements.company.value });
  location.assign("/");
});

document.querySelector("#order")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { title, branches } = event.target.elements;
  const error = event.target.querySelector(".error");
  try {
    const lines = branches.value.split("\n").map((line) => line.trim()).filter(Boolean);
    location.assign((await post("/reports", { title: title.value, branches: lines })).headers.get("Location"));
  } catch (refused) {
    error.textContent = refused.message;
    error.hidden = false;
  }
});

document.querySelector("[data-post]")?.addEventListener("click", (event) => {
  event.target.disabled = true;
  post(event.target.dataset.post);
});

const card = document.querySelector("#report");
if (card && ["queued", "running"].includes(card.dataset.status)) follow(card);

// The first message is the job's current state, the others are its events. The browser reconnects by itself, and then gets
// the events it missed.
function follow(card) {
  const bar = card.querySelector("progress"), words = card.querySelector(".message"), badge = card.querySelector(".badge");
  const status = { progress: "running", retrying: "queued" };
  const source = new EventSource(card.dataset.events);
  source.addEventListener("end", () => source.close());
  source.onmessage = ({ data }) => {
    const { type, payload, job } = JSON.parse(data);
    const step = type.replace("content_job.", "");
    badge.textContent = badge.dataset.status = card.dataset.status = status[step] ?? step;
    const done = step === "done", progress = done ? 1 : payload.progress ?? job?.progress;
    if (progress != null) bar.value = progress;
    words.textContent = done ? "Ready." : payload.errorMessage ?? payload.message ?? job?.progressMessage ?? "";
  };
}
