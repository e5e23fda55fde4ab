//! Debian's description format: a synopsis, then indented lines that make paragraphs.
//!
//! <https://www.debian.org/doc/debian-policy/ch-controlfields.html#description>: a line of one space is running text, of
//! two or more is verbatim, ` .` is an empty line.

/// One package's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub package: String,
    pub synopsis: String,
    pub paragraphs: Vec<String>,
}

/// Reads a `Translation-en` list.
pub fn parse(list: &str) -> impl Iterator<Item = Description> + '_ {
    list.split("\n\n").filter_map(stanza)
}

fn stanza(text: &str) -> Option<Description> {
    let mut lines = text.lines().skip_while(|line| line.is_empty()).peekable();
    let (mut package, mut synopsis, mut paragraphs) = (None, None, vec![]);
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("Package: ") {
            package = Some(name.trim().to_owned());
        } else if let Some(line) = line.strip_prefix("Description-en: ") {
            synopsis = Some(one_spaced(line));
            let body: Vec<_> = std::iter::from_fn(|| lines.next_if(|line| line.starts_with(' '))).collect();
            paragraphs = unfold(&body);
        }
    }
    Some(Description { package: package?, synopsis: synopsis?, paragraphs })
}

fn unfold(body: &[&str]) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    for line in body {
        let last = paragraphs.len() - 1;
        let text = one_spaced(line);
        if text == "." {
            paragraphs.push(String::new());
        } else if paragraphs[last].is_empty() {
            paragraphs[last] = text;
        } else {
            paragraphs[last].push(if line.starts_with("  ") { '\n' } else { ' ' });
            paragraphs[last].push_str(&text);
        }
    }
    paragraphs.retain(|paragraph| !paragraph.is_empty());
    paragraphs
}

fn one_spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_unfolded_into_paragraphs() {
        let list = "Package: kettle\nDescription-md5: 00\nDescription-en: boils  water\n It boils\n water.\n .\n Features:\n  * fast\n  * loud\n\n\nPackage: none\nDescription-md5: 11\n";
        let expected = Description {
            package: "kettle".into(),
            synopsis: "boils water".into(),
            paragraphs: vec!["It boils water.".into(), "Features:\n* fast\n* loud".into()],
        };
        assert_eq!(parse(list).collect::<Vec<_>>(), [expected]);
    }
}
