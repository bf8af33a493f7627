"""Reads adapters before anybody asks for them."""

from collections.abc import Mapping

from neuroada_serve.adapters.directory import OnProgress
from neuroada_serve.adapters.store import AdapterStore
from neuroada_serve.adapters.tiers import AdapterTiers
from neuroada_serve.errors import NeuroAdaError


def preload(
    store: AdapterStore, tiers: AdapterTiers, on_progress: OnProgress = lambda done, total: None
) -> Mapping[str, str]:
    """Bring all adapters to the device, or to the host, while there is room, by name; for the
    engine's thread, before it serves.

    Returns:
        Errors of the adapters that break the format, by name.
    """
    failed: dict[str, str] = {}
    versions = sorted(store.versions, key=lambda version: version.name)
    device_is_full = False
    for done, version in enumerate(versions):
        on_progress(done, len(versions))
        try:
            if not device_is_full:
                before = tiers.metrics.num_device_evictions
                tiers.fetch(version)
                device_is_full = tiers.metrics.num_device_evictions > before
            elif tiers.host.used_bytes + 2 * version.nnz <= tiers.host.size_bytes:
                tiers.host.read(version)
            else:
                break
        except NeuroAdaError as error:
            failed[version.name] = str(error)
    on_progress(len(versions), len(versions))
    return failed
