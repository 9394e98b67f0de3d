import re
from collections import defaultdict

registry = {}


def register_extra_network(network):
    registry[network.name] = network


class ExtraNetwork:
    def __init__(self, name):
        self.name = name


class ExtraNetworkParams:
    def __init__(self, items):
        self.items = items


def parse_prompt(prompt):
    """The prompt without its tags, and what each network is given."""
    found = defaultdict(list)

    def take(match):
        found[match[1]].append(ExtraNetworkParams(match[2].split(":")))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", take, prompt), found


def activate(p, data):
    """Every registered network is activated, with an empty list where the prompt does not name it."""
    for name, network in registry.items():
        network.activate(p, data.get(name, []))
