"""A new configuration for a running gateway, on SIGHUP or POST /reload; new keys as soon as they come."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helexa.errors import ConfigError
from helexa.gateway.catalogue import Catalogue, ModelEntry
from helexa.gateway.config import GatewayConfig
from helexa.gateway.gateway import Gateway
from helexa.log import fields
from helexa.settings import differences

logger = logging.getLogger(__name__)

KEYS_INTERVAL_S = 1.0
_FIXED = ("tls", "store", "anthropic")  # sections that are read once
_FIXED_KEYS = ("listen", "metrics_listen", "shutdown_grace_s")  # of [gateway]

Read = Callable[[], tuple[GatewayConfig, Catalogue]]


class Reloader:
    """Reads the files again; what is wrong with them is told and leaves everything as it was."""

    def __init__(self, gateway: Gateway, read: Read):
        self._gateway = gateway
        self._read = read
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> dict[str, Any]:
        """`changed`, key to old and new value, and `needs_restart`, the keys of it that wait for a restart.

        Raises ConfigError.
        """
        async with self._one_at_a_time:
            try:
                return await self._go_over()
            except ConfigError as error:
                logger.error("reload_failed", extra=fields(error=error.message))
                raise

    async def on_signal(self) -> None:
        """A reload that nobody waits for; the log has its outcome."""
        try:
            await self.reload()
        except ConfigError:
            return
        except Exception:
            logger.exception("reload_crashed")

    async def _go_over(self) -> dict[str, Any]:
        config, catalogue = self._read()
        former, former_catalogue = self._gateway.config, self._gateway.catalogue
        wanted = differences(former, config)
        config = _with_fixed(config, former)
        await self._gateway.reconfigure(config, catalogue)
        logging.getLogger().setLevel(config.log.level.upper())
        waiting = sorted(wanted.keys() - differences(former, config).keys())
        changed = wanted | differences(_Shown.of(former_catalogue), _Shown.of(catalogue))
        for key, (before, after) in changed.items():
            note = "needs a restart" if key in waiting else None
            logger.info("configuration_changed", extra=fields(key=key, before=before, after=after, note=note))
        logger.info("reloaded", extra=fields(changes=len(changed), keys=len(self._gateway.keys.principals)))
        return {"changed": changed, "needs_restart": waiting}


async def watch_keys(gateway: Gateway) -> None:
    """Takes over the keys file whenever it changes, until cancelled."""
    while True:
        await asyncio.sleep(KEYS_INTERVAL_S)
        try:
            if gateway.keys.refresh():
                principals = gateway.keys.principals
                gateway.ledger.forget_others(principals)
                logger.info("keys_changed", extra=fields(keys=len(principals)))
        except ConfigError as error:
            logger.error("keys_not_read", extra=fields(error=error.message))
        except Exception:
            logger.exception("keys_watch_failed")


@dataclass(frozen=True)
class _Shown:
    """A catalogue as its file has it."""

    models: tuple[ModelEntry, ...]
    aliases: Mapping[str, str]

    @staticmethod
    def of(catalogue: Catalogue) -> "_Shown":
        return _Shown(tuple(catalogue.models.values()), dict(catalogue.aliases))


def _with_fixed(config: GatewayConfig, former: GatewayConfig) -> GatewayConfig:
    """The new configuration with what only a restart can change as it is: above all, where we listen."""
    kept = {name: getattr(former.gateway, name) for name in _FIXED_KEYS}
    sections = {name: getattr(former, name) for name in _FIXED}
    return replace(config, gateway=replace(config.gateway, **kept), **sections)
