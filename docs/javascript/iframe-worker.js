// Search in pages that are opened from a folder, where browsers start no workers: the worker's
// script runs in a hidden frame, and messages are handed over as events.
(() => {
  if (location.protocol !== "file:") return;

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.receive(data);
      this.inside.importScripts = (...urls) => urls.reduce(
        (before, each) => before.then(() => this.run(each)),
        Promise.resolve(),
      );
      this.ready = this.run(url);
    }

    run(url) {
      const script = this.inside.document.createElement("script");
      script.src = new URL(url, location.href).href;
      return new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
        this.inside.document.body.append(script);
      });
    }

    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    }

    postMessage(data) {
      this.ready.then(() => {
        this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
      });
    }

    terminate() {
      this.inside.frameElement.remove();
    }
  };
})();
