"""The closed world: tables written by hand, and the facts read off them.

Everything the embedded base can know stands here: animals, things, foods, jobs, materials, social events and everyday
sequences. Categories share properties, with exceptions (a penguin is a bird that cannot fly), as in the real world. The
pretraining corpus (`corpus.py`) and the eight task families (`families.py`) are two ways of talking about these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# name | kind | home | food | covered with | way of moving | sound | size (1 smallest to 9 largest)
ANIMALS = """
dog|mammal|kennel|meat|fur|run|bark|5
cat|mammal|basket|fish|fur|run|purr|4
cow|mammal|barn|grass|hair|walk|moo|8
horse|mammal|stable|hay|hair|run|neigh|8
pig|mammal|sty|scraps|bristles|walk|grunt|6
sheep|mammal|meadow|grass|wool|walk|bleat|6
goat|mammal|meadow|leaves|hair|climb|bleat|6
mouse|mammal|hole|seeds|fur|run|squeak|2
rabbit|mammal|burrow|carrots|fur|hop|squeak|4
fox|mammal|den|hens|fur|run|bark|5
wolf|mammal|den|meat|fur|run|howl|6
bear|mammal|cave|honey|fur|walk|growl|8
lion|mammal|plain|meat|fur|run|roar|7
tiger|mammal|jungle|meat|fur|run|roar|7
monkey|mammal|jungle|bananas|fur|climb|chatter|5
elephant|mammal|plain|leaves|skin|walk|trumpet|9
whale|mammal|sea|shrimps|skin|swim|sing|9
dolphin|mammal|sea|fish|skin|swim|whistle|7
bat|mammal|cave|moths|fur|fly|squeak|3
squirrel|mammal|tree|nuts|fur|climb|chatter|3
mole|mammal|burrow|worms|fur|dig|squeak|3
camel|mammal|desert|thorns|hair|walk|grunt|8
hen|bird|coop|grain|feathers|walk|cluck|4
duck|bird|pond|weeds|feathers|swim|quack|4
goose|bird|pond|grass|feathers|swim|honk|5
owl|bird|tree|mice|feathers|fly|hoot|4
eagle|bird|cliff|rabbits|feathers|fly|scream|5
sparrow|bird|nest|seeds|feathers|fly|chirp|2
crow|bird|nest|scraps|feathers|fly|croak|4
parrot|bird|jungle|nuts|feathers|fly|talk|4
penguin|bird|ice|fish|feathers|swim|honk|5
ostrich|bird|plain|seeds|feathers|run|boom|7
gull|bird|cliff|fish|feathers|fly|scream|4
snake|reptile|desert|mice|scales|crawl|hiss|4
lizard|reptile|desert|flies|scales|crawl|hiss|3
turtle|reptile|pond|weeds|shell|swim|hiss|4
crocodile|reptile|river|meat|scales|swim|growl|7
frog|amphibian|pond|flies|skin|hop|croak|3
toad|amphibian|garden|worms|skin|hop|croak|3
shark|fish|sea|fish|scales|swim|nothing|7
salmon|fish|river|flies|scales|swim|nothing|4
goldfish|fish|bowl|crumbs|scales|swim|nothing|2
bee|insect|hive|nectar|hair|fly|buzz|1
ant|insect|hill|crumbs|shell|crawl|nothing|1
butterfly|insect|meadow|nectar|scales|fly|nothing|1
cricket|insect|meadow|leaves|shell|hop|chirp|1
snail|mollusc|garden|leaves|shell|crawl|nothing|1
spider|spider|web|flies|hair|crawl|nothing|1
"""

# name | what one uses it for | material | where it is kept | size
THINGS = """
hammer|drive a nail|steel|workshop|4
saw|cut a board|steel|workshop|4
drill|make a hole|steel|workshop|4
file|smooth an edge|steel|workshop|3
spade|dig a ditch|steel|shed|6
rake|gather leaves|steel|shed|6
axe|split logs|steel|shed|5
ladder|reach a roof|wood|shed|7
bucket|carry water|plastic|shed|5
hose|water a lawn|rubber|shed|6
broom|sweep a floor|wood|hall|6
umbrella|keep off the rain|cloth|hall|5
coat|keep warm outside|cloth|hall|5
boot|walk through mud|rubber|hall|4
key|open a lock|brass|hall|1
candle|light a dark room|wax|drawer|2
pencil|draw a picture|wood|desk|1
ruler|measure a line|plastic|desk|3
scissors|cut paper|steel|desk|3
eraser|rub out a mistake|rubber|desk|1
envelope|post a letter|paper|desk|3
notebook|write down a plan|paper|desk|3
map|find a road|paper|car|3
lens|look at tiny letters|glass|desk|2
bottle|hold juice|glass|kitchen|3
jar|store jam|glass|kitchen|3
kettle|boil water|copper|kitchen|4
pan|fry an egg|iron|kitchen|4
pot|cook soup|iron|kitchen|5
spoon|stir tea|silver|kitchen|2
knife|slice bread|steel|kitchen|3
plate|serve a meal|clay|kitchen|3
mug|drink cocoa|clay|kitchen|2
grater|shred cheese|steel|kitchen|3
board|chop onions|wood|kitchen|4
sponge|wipe a table|plastic|sink|2
towel|dry wet hands|cloth|bathroom|4
brush|clean teeth|plastic|bathroom|2
comb|tidy hair|plastic|bathroom|2
mirror|see your own face|glass|bathroom|5
soap|wash dirty skin|wax|bathroom|2
pillow|rest a tired head|cloth|bedroom|4
blanket|stay warm in bed|wool|bedroom|6
clock|tell the time|brass|bedroom|3
needle|sew a button|steel|basket|1
thread|mend a torn shirt|cloth|basket|1
ball|play a match|rubber|garden|3
bench|sit in the sun|wood|garden|7
rope|tie up a boat|cloth|harbour|6
anchor|hold a ship still|iron|harbour|7
paddle|row a canoe|wood|harbour|6
net|catch fish|cloth|harbour|6
"""

# name (a * marks a mass noun) | kind | taste | colour | where it comes from
FOODS = """
lemon|fruit|sour|yellow|tree
lime|fruit|sour|green|tree
apple|fruit|sweet|red|tree
pear|fruit|sweet|green|tree
plum|fruit|sweet|purple|tree
cherry|fruit|sweet|red|tree
banana|fruit|sweet|yellow|palm
coconut|fruit|sweet|brown|palm
date|fruit|sweet|brown|palm
grape|fruit|sweet|purple|vine
cranberry|fruit|sour|red|bush
gooseberry|fruit|sour|green|bush
blueberry|fruit|sweet|blue|bush
melon|fruit|sweet|green|field
olive|fruit|salty|green|tree
carrot|vegetable|sweet|orange|soil
turnip|vegetable|bitter|white|soil
beet|vegetable|sweet|purple|soil
radish|vegetable|hot|red|soil
onion|vegetable|hot|white|soil
leek|vegetable|mild|green|soil
potato|vegetable|mild|brown|soil
pumpkin|vegetable|mild|orange|field
cabbage|vegetable|bitter|green|field
spinach*|vegetable|bitter|green|field
pepper*|spice|hot|black|vine
salt*|spice|salty|white|sea
ginger*|spice|hot|yellow|soil
mustard*|spice|hot|yellow|field
honey*|syrup|sweet|golden|hive
sugar*|sweetener|sweet|white|field
milk*|drink|mild|white|cow
coffee*|drink|bitter|black|bush
tea*|drink|bitter|brown|bush
vinegar*|dressing|sour|brown|vine
cheese*|snack|salty|yellow|cow
ham*|meat|salty|pink|pig
bacon*|meat|salty|pink|pig
rice*|grain|mild|white|field
chocolate*|snack|bitter|brown|bush
"""

# job | what they do all day | where they work | the thing they use (from THINGS or FOODS)
JOBS = """
carpenter|build chairs|workshop|saw
baker|bake bread|bakery|board
butcher|sell meat|market|knife
farmer|grow wheat|farm|rake
gardener|plant roses|park|spade
fisher|bring in fish|harbour|net
sailor|steer ships|harbour|anchor
teacher|explain sums|school|ruler
painter|draw portraits|studio|pencil
tailor|sew suits|shop|needle
barber|cut hair|salon|comb
cook|prepare dinners|restaurant|pot
waiter|carry plates|restaurant|plate
nurse|care for the sick|hospital|towel
doctor|treat illness|hospital|lens
dentist|fix teeth|clinic|mirror
firefighter|put out fires|station|hose
postman|deliver letters|post office|envelope
driver|steer buses|road|map
plumber|repair pipes|cellar|drill
cleaner|scrub floors|hotel|sponge
guard|watch the gate|castle|key
miner|dig for coal|mine|candle
woodcutter|fell trees|forest|axe
smith|shape iron|forge|hammer
potter|make cups|kiln|clock
writer|tell stories|library|notebook
roofer|mend roofs|rooftop|ladder
"""

# material | in water it will | in a fire it will | when dropped it will | to the touch it is
MATERIALS = """
wood|float|burn|stay whole|hard
steel|sink|glow|stay whole|hard
iron|sink|glow|stay whole|hard
copper|sink|glow|stay whole|hard
brass|sink|glow|stay whole|hard
silver|sink|melt|stay whole|hard
plastic|float|melt|bounce|smooth
wax|float|melt|stay whole|smooth
rubber|float|smoke|bounce|soft
glass|sink|crack|break|smooth
clay|sink|crack|break|hard
cloth|soak|burn|fold|soft
wool|soak|burn|fold|soft
paper|soak|burn|fold|smooth
"""

# what A did | how A feels | what A will want to do next | what A had to do before | why A did it
EVENTS = """
{A} won the spelling contest|proud|show the prize to the family|learn many hard words|to be the best speller
{A} broke {B}'s favourite cup|sorry|offer to buy another cup|pick the cup up|by mistake while washing up
{A} carried {B}'s heavy bags home|helpful|put the bags down and rest|meet {B} at the shop|to spare {B} the weight
{A} forgot {B}'s birthday|ashamed|send a late card|lose track of the date|because the week was so busy
{A} waited two hours for the bus|bored|sit down and ride home|walk to the bus stop|to travel without a car
{A} saw a snake on the path|afraid|run away from it|go out for a walk|to look where the path went
{A} sang alone on the stage|nervous|hear the crowd clap|practise the song|to share the music
{A} gave {B} half of the sandwich|generous|eat the other half|make a sandwich|because {B} was hungry
{A} lost the house key|worried|call someone with a spare key|lock the door|because the pocket had a hole
{A} finished a long race|tired|lie down and drink water|train every morning|to test the legs
{A} was told a secret by {B}|trusted|keep quiet about it|listen to {B}|to learn what troubled {B}
{A} shouted at {B}|angry|calm down and say sorry|quarrel with {B}|because {B} would not listen
{A} found a lost puppy|caring|look for its owner|hear it cry|to save it from the cold
{A} received flowers from {B}|pleased|put them in a vase|open the door to {B}|because {B} wanted to say thanks
{A} failed the driving test|disappointed|take more lessons|sign up for the test|to be allowed to drive
{A} moved to a new town|lonely|get to know the neighbours|pack all the boxes|to start another job
{A} stayed up all night|sleepy|go to bed early|drink strong coffee|to finish the report
{A} cooked dinner for {B}|satisfied|sit down and eat with {B}|buy food at the market|to treat {B} to a warm meal
{A} heard a strange noise upstairs|scared|check every room|be alone at home|to make sure nobody was there
{A} taught {B} to swim|patient|let {B} try alone|jump into the pool|so that {B} would be safe in water
{A} spilled ink on the letter|annoyed|write it again|open the ink|because the hand slipped
{A} opened a big surprise present|excited|try the present out|untie the ribbon|to see what was inside
{A} visited {B} in hospital|gentle|wish {B} a quick recovery|ask where {B} was lying|to cheer {B} up
{A} told {B} a funny joke|amused|tell one more joke|think of a joke|to make {B} laugh
{A} said goodbye to {B} at the station|sad|wave until the train is gone|bring {B} to the train|because {B} was leaving
{A} lent {B} an umbrella|kind|get it back tomorrow|own two umbrellas|so that {B} would stay dry
{A} repaired the old bicycle|clever|go for a ride|get out the tools|to save money
{A} ate five bowls of soup|full|loosen the belt|fill the bowl again and again|because lunch had been left out
{A} watched the rain through the window|calm|keep watching the drops|come inside|to enjoy a quiet hour
{A} pushed in front of {B} in the line|rude|pay and leave quickly|ignore the other people|to catch a train in time
{A} saved {B} from the river|brave|wrap {B} in a blanket|leap into the water|because {B} could not swim
{A} lost the card game to {B}|beaten|ask {B} for another game|sit down at the table with {B}|because {B} had better cards
{A} planted a whole garden|hopeful|wait for the first sprouts|buy bags of seeds|to grow fresh vegetables
{A} was stung by a bee|hurt|cool the sting with ice|walk through the clover|because the bee felt trapped
{A} read a very long novel|curious|find the next book of the series|borrow it from the library|to know how the story ends
{A} invited {B} to the party|friendly|bake a cake for the guests|write a card with the address|to spend the evening with {B}
{A} cleaned the whole house|relieved|enjoy the tidy rooms|fetch a mop and rags|because visitors were coming
{A} copied {B}'s homework|guilty|confess it to the teacher|look over {B}'s shoulder|because the sums were too hard
{A} climbed the highest mountain|thrilled|take a photo at the top|pack ropes and warm clothes|to see the world from above
{A} missed the last train|stranded|look for a place to stay|arrive late at the platform|because the taxi was slow
"""

# activity | five steps in order, each to be read after a subject: "She ..."
SCRIPTS = """
Making tea|fills the kettle|brings the water to the boil|pours it over the leaves|waits a few minutes|drinks the tea slowly
Washing a car|parks it in the yard|sprays it with water|rubs it with a soapy cloth|rinses off the foam|dries it with a towel
Planting a tree|chooses a sunny spot|digs a deep hole|sets the roots in the hole|fills it with soil|waters the young tree
Baking bread|mixes flour and yeast|kneads the dough|lets the dough rise|puts the loaf in the oven|takes out the brown loaf
Posting a parcel|wraps it in brown paper|writes the address on it|carries it to the post office|pays for the stamps|hands it to the clerk
Catching a fish|walks to the river|puts a worm on the hook|throws out the line|waits for a bite|pulls the fish ashore
Building a fire|gathers dry sticks|stacks them in a circle|strikes a match|blows on the small flame|warms both hands
Getting dressed|opens the wardrobe|picks a clean shirt|pulls on the trousers|ties the shoes|looks in the mirror
Painting a wall|covers the floor with paper|opens the tin of paint|dips the roller in paint|rolls it up and down the wall|lets the wall dry
Riding a bus|waits at the stop|climbs aboard|buys a ticket|takes a seat by the window|gets off in the centre
Mending a tyre|takes off the wheel|finds the hole in the tube|glues a patch on it|pumps it up with air|fits the wheel back on
Borrowing a book|enters the library|searches the shelves|takes the book to the desk|shows the library card|reads it at home
Brushing a horse|leads it out of the stable|ties it to a post|loosens the mud with a stiff brush|combs the mane|gives it an apple
Sewing a button|chooses a matching thread|threads the needle|pushes it through the cloth|ties a knot|cuts off the loose end
Taking a bath|turns on the tap|tests how warm the water is|steps into the tub|washes with soap|pulls out the plug
Going to bed|puts on pyjamas|brushes the teeth|lies down|turns off the lamp|falls asleep
Cooking noodles|fills a pot with water|adds a little salt|drops the noodles in|drains them in a sieve|stirs in the sauce
Cutting hair|drapes a cape around the neck|wets the hair|trims the ends with scissors|blows it dry|holds up a hand mirror
Picking apples|leans the ladder on the trunk|climbs up to the branches|twists the fruit off|lays it in a basket|carries the basket to the cellar
Flying a kite|runs across the windy field|lets the kite rise|unwinds the string|steers it through the sky|reels it in again
Making a snowman|rolls a huge ball of snow|sets a smaller ball on top|adds a head|pushes in a carrot nose|puts an old hat on it
Writing a letter|takes out a sheet of paper|writes the date|greets the friend|tells all the news|signs at the bottom
Milking a cow|brings a stool and a pail|sits down beside the cow|wipes the udder|squeezes the milk into the pail|carries the full pail away
Frying an egg|melts butter in the pan|cracks the shell|lets the white turn firm|sprinkles some pepper|slides it onto a plate
Hanging a picture|marks a place on the wall|drives in a nail|hooks the frame over it|steps back to look|straightens the frame
Shopping for food|writes a list|pushes a cart through the aisles|fills the cart|pays at the till|carries the bags home
Playing tennis|bounces the ball|tosses it up high|hits it over the net|runs to meet the return|wins the point
Visiting the dentist|sits in the waiting room|is called by the nurse|leans back in the chair|opens the mouth wide|rinses the mouth
Putting up a tent|clears away the stones|spreads out the groundsheet|joins the poles|raises the canvas|hammers in the pegs
Washing clothes|sorts them by colour|loads the machine|adds washing powder|presses the start button|hangs them on the line
Giving a speech|steps up to the microphone|greets the audience|explains the main idea|answers a few questions|bows to the applause
Rowing a boat|unties it from the dock|sits down facing backwards|dips both oars|pulls with straight arms|glides across the lake
Making jam|washes the berries|cooks them with sugar|stirs until it thickens|fills it into jars|sticks on labels
Feeding a baby|fastens a bib|mashes a banana|offers a small spoon|wipes the chin|lifts the baby from the chair
Wrapping a gift|measures the box|cuts the coloured paper|folds it around the box|tapes down the edges|tops it with a bow
Sharpening a knife|wets the stone|holds the blade at an angle|draws it over the stone|turns it to the other side|tests it on paper
Boarding a plane|checks in the suitcase|goes through security|finds the gate|shows the boarding pass|buckles the belt
Watering plants|fills the can|carries it to the window|pours a little on each plant|picks off dry leaves|empties the saucers
Cleaning a window|mixes soap into warm water|wets the pane|scrubs off the dirt|draws the wiper down|polishes the corners
Making a sandwich|takes two slices of bread|spreads butter on them|lays cheese on one slice|presses the other on top|cuts it in half
"""

GIRLS = "Anna Mia Ella Nora Lucy Ruth Clara Emma Ida Jane Rosa Vera".split()
BOYS = "Ben Tom Leo Max Paul Noah Carl Finn Hugo Jack Otto Sam".split()
NAMES: list[str] = [*GIRLS, *BOYS]


def rows(table: str) -> list[list[str]]:
    """The rows of one of the tables above, each a list of its columns."""
    return [line.split("|") for line in table.strip().splitlines()]


def a(noun: str) -> str:
    """The noun with its indefinite article; a mass noun or plural ("scissors") stays bare."""
    if noun in MASS or noun == "scissors":
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


MASS = frozenset(row[0].rstrip("*") for row in rows(FOODS) if row[0].endswith("*")) | {"soap", "thread"}


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `value`; e.g. ("home", "owl", "tree")."""

    relation: str
    subject: str
    value: str

    @property
    def key(self) -> str:
        return f"{self.relation}/{self.subject}"


COLUMNS = {
    "animal": (ANIMALS, ("kind", "home", "eats", "cover", "moves", "sound")),
    "thing": (THINGS, ("use", "material", "kept")),
    "food": (FOODS, ("sort", "taste", "colour", "source")),
    "job": (JOBS, ("duty", "workplace", "tool")),
    "material": (MATERIALS, ("water", "fire", "drop", "touch")),
}


@cache
def facts() -> dict[str, list[Fact]]:
    """All facts by relation, read from the tables; the two-step relations are joined from two tables each."""
    out: dict[str, list[Fact]] = {}
    for table, relations in COLUMNS.values():
        for row in rows(table):
            for relation, value in zip(relations, row[1:], strict=False):
                out.setdefault(relation, []).append(Fact(relation, row[0].rstrip("*"), value))
    material = {f.subject: f.value for f in out["material"]}
    use = {f.subject: f.value for f in out["use"]}
    kept = {f.subject: f.value for f in out["kept"]}
    for relation in ("water", "fire", "drop", "touch"):  # a thing behaves as its material does
        behaviour = {f.subject: f.value for f in out[relation]}
        out[f"thing_{relation}"] = [Fact(f"thing_{relation}", s, behaviour[m]) for s, m in material.items()]
    out["duty_tool"] = [
        Fact("duty_tool", duty.value, tool.value) for duty, tool in zip(out["duty"], out["tool"], strict=True)
    ]
    out["duty_place"] = [
        Fact("duty_place", duty.value, place.value) for duty, place in zip(out["duty"], out["workplace"], strict=True)
    ]
    out["use_kept"] = [Fact("use_kept", use[s], kept[s]) for s in use]
    out["use_material"] = [Fact("use_material", use[s], material[s]) for s in use]
    for column, name in enumerate(("feel", "next", "before", "why"), start=1):
        out[name] = [Fact(name, row[0], row[column]) for row in rows(EVENTS)]
    out["then"] = [Fact("then", f"{row[0]}|{i}", row[i + 1]) for row in rows(SCRIPTS) for i in range(1, 5)]
    return out


@cache
def value_of(relation: str) -> dict[str, str]:
    """subject -> value of one relation."""
    return {f.subject: f.value for f in facts()[relation]}


@cache
def values(relation: str) -> tuple[str, ...]:
    """The distinct values of a relation, sorted."""
    return tuple(sorted({f.value for f in facts()[relation]}))


@cache
def sizes() -> dict[str, int]:
    """Size class (1 smallest to 9 largest) of every animal and thing."""
    return {row[0]: int(row[-1]) for row in rows(ANIMALS) + rows(THINGS)}
