"""Prints the address that other nodes use for this one: `own_address.py [INTERFACE]`."""

from __future__ import annotations

import sys


def main() -> None:
    if len(sys.argv) > 1:
        from vime.addresses import address_of
        from vime.errors import ConfigError

        try:
            print(address_of(sys.argv[1]))
        except ConfigError as error:
            sys.exit(f"error: {error}")
        return
    import ray.util

    address = ray.util.get_node_ip_address()
    if address.startswith("127.") or address == "::1":
        sys.exit(
            f"error: this node found no address but {address}, and no other node can reach that. "
            "Set NODE_ADDRESS to its address, or NODE_INTERFACE to its interface."
        )
    print(address)


if __name__ == "__main__":
    main()
