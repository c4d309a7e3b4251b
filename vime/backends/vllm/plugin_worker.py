"""The methods that vime adds to vLLM's workers (`--worker-extension-cls`), for /collective_rpc."""

from __future__ import annotations

from typing import Any

from vime.weight_sync.wire import checksum


class WorkerExtension:
    """Every worker answers for itself, so a worker that missed an update is noticed."""

    vime_version: int = 0
    vime_received: dict[str, str] | None = None

    def vime_set_weight_version(self, version: int) -> dict[str, int]:
        self.vime_version = version
        return self.vime_weight_version()

    def vime_weight_version(self) -> dict[str, int]:
        return {"rank": self.rank, "version": self.vime_version}

    def vime_record_checksums(self) -> None:
        """Take a checksum of every tensor that the next update loads, with any transport."""
        model = self.model_runner.get_model()
        if self.vime_received is None:
            load = model.load_weights

            def load_and_record(weights: Any) -> Any:
                def recorded():
                    for name, tensor in weights:
                        self.vime_received[name] = checksum(tensor)
                        yield name, tensor

                return load(recorded())

            model.load_weights = load_and_record
        self.vime_received = {}

    def vime_checksums(self) -> dict[str, str]:
        """{tensor: checksum} since `vime_record_checksums`. Ends the recording."""
        received, self.vime_received = self.vime_received or {}, None
        self.model_runner.get_model().__dict__.pop("load_weights", None)
        return received
