"""Two sentences of the same novel in several languages, by ISO-639-1 code."""

TEXTS = {
    "en": "All happy families are alike; each unhappy family is unhappy in its own way. "
    "Everything was confusion in the house of the Oblonskys.",
    "de": "Alle glücklichen Familien gleichen einander, jede unglückliche Familie ist auf ihre "
    "eigene Weise unglücklich. Im Hause herrschte allgemeine Verwirrung.",
    "fr": "Toutes les familles heureuses se ressemblent ; chaque famille malheureuse est "
    "malheureuse à sa façon. Tout était bouleversé dans la maison.",
    "ru": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива "
    "по-своему. Все смешалось в доме Облонских.",
    "ja": "幸福な家庭はすべて互いに似かよったものであり、不幸な家庭はどこもその不幸のおもむきが"
    "異なっているものである。家の中は混乱していました。",
    "vi": "Mọi gia đình hạnh phúc đều giống nhau, mỗi gia đình bất hạnh lại bất hạnh theo một "
    "cách riêng. Mọi thứ trong nhà đều đảo lộn.",
}
