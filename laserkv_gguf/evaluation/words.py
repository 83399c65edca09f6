"""Plain English words for keys and lists.

Ours, so that samples need no word-list package and are the same everywhere.
"""

from __future__ import annotations

_ADJECTIVES = """
able amber ancient autumn bitter blue bold brave bright broad broken bronze busy calm careful
cheap clean clear clever cold cool copper crisp curious dark deep distant double dry dusty
early eager empty endless faint famous fancy fast feral fierce final fine firm flat foggy
fresh frosty gentle giant glad golden grand green grey happy hard heavy hidden hollow honest
humble icy idle inner iron jolly keen kind large late lazy light little lively lonely long
loud loyal lucky mellow merry mild misty modern muddy narrow neat new noble northern odd old
open orange outer pale patient plain polite proud purple quick quiet rapid rare ready red rich
ripe rough round royal rusty salty secret shallow sharp shiny short shy silent silver simple
sleepy slim slow small smooth soft solid southern spare steady steep stern still stormy strange
strong sturdy subtle sudden summer sunny sweet swift tall tame tender thick thin tidy timid
tiny tired tough twin upper urban vast velvet violet vivid warm wary western white wide wild
windy winter wise wooden yellow young
"""
_NOUNS = """
acorn anchor apron arrow badge bakery balloon banjo barn barrel basket beacon beaver bell bench
berry blanket boat bottle branch bridge broom bucket button cabin cable camel candle canoe
canyon carpet castle cellar chapel cherry chimney circle clock cloud coast comet compass coral
corner cottage cradle crane cricket crown curtain daisy desert dolphin donkey drawer drum eagle
ember engine falcon farmer feather fence ferry fiddle field finch flag flute forest fountain
fox garden gate glacier glove goose grape guitar hammer harbor hawk hazel helmet heron hill
hinge honey horn horse island ivory jacket jar jewel journal kettle kite knot ladder lagoon
lamp lantern lark leaf ledge lemon letter lily lion lizard lobster locket magnet maple market
marsh meadow mirror mitten monkey moth mountain mug needle nest oak oar ocean olive onion
orchard otter oven owl paddle palace paper parrot pasture path peach pear pebble pencil
pepper piano pigeon pillow pine planet plum pocket pond porch prairie puzzle quarry quill
rabbit radio raft raven ribbon river robin rocket roof rope saddle sail salmon scarf
school shadow shell shore shovel signal sparrow spider spoon spring squirrel stable star
statue stone street sunset swan table tailor temple thimble thunder ticket tiger timber tower
trail train trumpet tulip tunnel turtle valley vase village violin wagon walnut water whale
wheel whistle willow window wolf wren yard zebra
"""

ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
