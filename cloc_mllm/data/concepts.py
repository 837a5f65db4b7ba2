"""The things that built-in scenes show: a name and the OpenMoji character that draws it."""

SEEN: dict[str, str] = {
    "apple": "🍎", "banana": "🍌", "grapes": "🍇", "watermelon": "🍉", "strawberry": "🍓",
    "pineapple": "🍍", "lemon": "🍋", "carrot": "🥕", "mushroom": "🍄", "broccoli": "🥦",
    "pizza": "🍕", "hamburger": "🍔", "hot dog": "🌭", "ice cream": "🍦", "doughnut": "🍩",
    "birthday cake": "🎂", "cheese": "🧀", "bread": "🍞", "fried egg": "🍳", "coffee": "☕",
    "wine glass": "🍷", "beer mug": "🍺", "dog": "🐕", "cat": "🐈", "horse": "🐎",
    "cow": "🐄", "pig": "🐖", "sheep": "🐑", "rabbit": "🐇", "elephant": "🐘",
    "giraffe": "🦒", "camel": "🐫", "monkey": "🐒", "tiger": "🐅", "turtle": "🐢",
    "snake": "🐍", "crocodile": "🐊", "frog": "🐸", "fish": "🐟", "shark": "🦈",
    "whale": "🐳", "octopus": "🐙", "crab": "🦀", "snail": "🐌", "butterfly": "🦋",
    "bee": "🐝", "ladybug": "🐞", "spider": "🕷", "duck": "🦆", "owl": "🦉",
    "penguin": "🐧", "rooster": "🐓", "flamingo": "🦩", "tree": "🌳", "palm tree": "🌴",
    "cactus": "🌵", "sunflower": "🌻", "rose": "🌹", "car": "🚗", "bus": "🚌",
    "fire engine": "🚒", "tractor": "🚜", "bicycle": "🚲", "motorcycle": "🏍", "train": "🚂",
    "airplane": "✈", "helicopter": "🚁", "rocket": "🚀", "sailboat": "⛵", "anchor": "⚓",
    "traffic light": "🚦", "house": "🏠", "castle": "🏰", "tent": "⛺", "clock": "⏰",
    "hourglass": "⌛", "key": "🔑", "lock": "🔒", "hammer": "🔨", "scissors": "✂",
    "light bulb": "💡", "candle": "🕯", "book": "📕", "pencil": "✏", "envelope": "✉",
    "camera": "📷", "television": "📺", "telephone": "☎", "guitar": "🎸", "trumpet": "🎺",
    "drum": "🥁", "violin": "🎻", "soccer ball": "⚽", "basketball": "🏀", "tennis ball": "🎾",
    "trophy": "🏆", "crown": "👑", "umbrella": "☂", "hat": "🎩", "boot": "👢",
    "t-shirt": "👕", "dress": "👗", "glasses": "👓", "balloon": "🎈", "gift": "🎁",
    "magnet": "🧲", "robot": "🤖", "ghost": "👻", "skull": "💀", "star": "⭐",
    "cloud": "☁", "moon": "🌙",
}  # fmt: skip

HELD_OUT: dict[str, str] = {
    "pear": "🍐", "cherries": "🍒", "corn": "🌽", "taco": "🌮", "lion": "🦁",
    "kangaroo": "🦘", "dolphin": "🐬", "peacock": "🦚", "tulip": "🌷", "truck": "🚚",
    "chair": "🪑", "saxophone": "🎷",
}  # fmt: skip
