// For readers with a keyboard or a screen reader: what scrolls can be reached, and the search has a name.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
const reach = () => {
  for (const box of document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .formula"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
}
addEventListener("load", reach)
addEventListener("resize", reach)

// The search box of the page of architectures: what became of each, from the lists and tables below it.
const place = document.getElementById("find-architecture")
if (place) {
  const known = []
  for (const heading of document.querySelectorAll(".md-content h2")) {
    const outcome = heading.textContent.replace(/ \(\d+\)\W*$/, "")
    for (let part = heading.nextElementSibling; part && part.tagName !== "H2"; part = part.nextElementSibling) {
      if (part.tagName === "P") for (const name of part.textContent.split(", ")) known.push([name, outcome])
      for (const row of part.querySelectorAll("tbody tr"))
        known.push([row.cells[0].textContent, `${outcome}: ${row.cells[1].textContent}`])
    }
  }
  const label = document.createElement("label")
  const input = document.createElement("input")
  const found = document.createElement("ul")
  input.type = "search"
  label.append("Find an architecture ", input)
  found.setAttribute("aria-live", "polite")
  place.append(label, found)
  place.hidden = false
  input.addEventListener("input", () => {
    const asked = input.value.trim().toLowerCase()
    const matches = asked ? known.filter(([name]) => name.toLowerCase().includes(asked)) : []
    const lines = matches.slice(0, 12).map(([name, outcome]) => [name, outcome])
    if (matches.length > 12) lines.push([`and ${matches.length - 12} more`, ""])
    if (asked && !matches.length) lines.push(["none of this name", ""])
    found.replaceChildren(
      ...lines.map(([name, outcome]) => {
        const line = document.createElement("li")
        line.textContent = outcome ? `${name}: ${outcome}` : name
        return line
      }),
    )
  })
}
