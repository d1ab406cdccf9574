"""Distinct English words and pairs of words: keys of needles, and the vocabulary of word-counting tasks."""

import numpy as np

from qwen_jax.errors import InputError

_ADJECTIVES = """
able acid aged alert amber ancient arctic ashen basic bitter bland bold bright brisk broad bronze calm careful casual
charming cheap chilly clean clear clever cloudy coastal cold common copper coral cosmic cozy crimson crisp curious
daily damp daring dark deep dense distant double dry dusty eager early earnest elastic elder empty even exact faint
fair famous fancy fast fearless fierce final firm flat fluffy foggy formal fragile free fresh frosty full gentle giant
glad glossy golden grand gray green happy harsh heavy hidden high hollow honest humble icy idle inner iron jolly keen
kind large late lean level light little lively local lonely long loose loud loyal lucky lunar mellow mild misty modest
narrow native neat nimble noble northern odd old open orange outer pale patient plain polite proud purple quick quiet
rapid rare ready red remote rich rigid ripe robust rough round royal rustic salty scarlet secret sharp shiny short shy
silent silky silver simple slim slow small smooth soft solar solid southern square stable steady steep still stormy
strange strict strong sturdy sudden sunny sweet swift tall tame tender thick thin tidy tiny tough true urban vast
velvet vital warm wide wild wise wooden young
""".split()  # fmt: skip
_NOUNS = """
acorn actor anchor ankle apple apron arch arrow atlas badge bagel baker balcony bamboo banjo barn basin basket beacon
bead beaver bench berry bishop blanket bloom boat bottle boulder bowl branch bread brick bridge broom brush bucket
button cabin cable cactus camel candle canoe canyon captain carpet carrot castle cedar cellar chair chalk cherry
chimney circle citadel cliff clock cloud clover coach coast cobra comet compass cookie cottage cotton cradle crane
crater cricket crown cube curtain cushion dancer desert diamond dolphin donkey door dragon drum eagle easel elbow
ember engine falcon farmer feather fence fern fiddle field finch flame flute forest fork fossil fountain fox frame
galaxy garden garlic geyser ginger glacier glove goat grape guitar hammer harbor harp hawk hazel helmet heron hill
hinge honey horse hotel island ivory jacket jaguar jewel jungle kettle kite kitten ladder lagoon lamp lantern lemon
lily lizard lobster locket magnet mango maple marble market meadow melon mirror monkey moon mosaic mountain museum
needle nest notebook oasis ocean olive onion orchard otter oyster paddle palace panda paper parrot peach pebble pencil
pepper piano pillow pilot planet plum pocket poet pond potato prism pumpkin quartz quilt rabbit raven ribbon river
robin rocket saddle sailor salmon scarf shell shepherd shovel spider spoon squirrel statue stone stove swan table
teapot temple thimble thunder tiger timber tower trumpet tulip tunnel turtle umbrella valley vase village violin wagon
walnut whale wheel willow window wizard wolf yacht zebra
""".split()  # fmt: skip


def pairs(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct keys such as "silver-otter"; where these do not suffice, some of three words.

    Args:
      rng: random numbers.
      count: how many.

    Raises:
      InputError: more than there are.
    """
    a, n = len(_ADJECTIVES), len(_NOUNS)
    two, three = a * n, a * a * n
    if count > two + three:
        raise InputError(f"There are {two + three:,} keys of two or three words, {count:,} were asked for.")
    # A random choice of pairs alone, unless more are needed.
    chosen = rng.choice(two if count <= two else two + three, count, replace=False).tolist()

    def key(i: int) -> str:
        if i < two:
            return f"{_ADJECTIVES[i // n]}-{_NOUNS[i % n]}"
        first, rest = divmod(i - two, two)
        return f"{_ADJECTIVES[first]}-{_ADJECTIVES[rest // n]}-{_NOUNS[rest % n]}"

    return list(map(key, chosen))


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words in random order: single ones first, then pairs.

    Args:
      rng: random numbers.
      count: how many.
    """
    single = list(dict.fromkeys([*_ADJECTIVES, *_NOUNS]))
    chosen = [single[i] for i in rng.permutation(len(single))[:count].tolist()]
    return chosen + (pairs(rng, count - len(chosen)) if count > len(chosen) else [])
