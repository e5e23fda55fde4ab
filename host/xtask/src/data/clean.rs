//! What is kept of the descriptions: documents that say something, each once.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::Row;
use super::description::Description;

/// A paragraph that stands in this many packages ("This package contains the development files.") says nothing about any.
const BOILERPLATE_PACKAGES: usize = 8;
/// Two documents are twins when the smaller shares at least half of its runs of this many words with the other.
const RUN_WORDS: usize = 5;
const DOCUMENT_CHARS: std::ops::RangeInclusive<usize> = 200..=3000;
const SUMMARY_CHARS: std::ops::RangeInclusive<usize> = 15..=100;

/// What became of the packages.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    packages: usize,
    boilerplate_paragraphs: usize,
    wrong_length: usize,
    summary_in_document: usize,
    twins: usize,
    kept: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packages, boilerplate_paragraphs, wrong_length, summary_in_document, twins, kept } = self;
        writeln!(f, "packages: {packages}; boilerplate paragraphs removed: {boilerplate_paragraphs}")?;
        writeln!(
            f,
            "left out: {wrong_length} too short or long, {summary_in_document} that begin with their summary, {twins} like another"
        )?;
        write!(f, "kept: {kept}")
    }
}

pub fn clean(mut descriptions: Vec<Description>) -> (Vec<Row>, Report) {
    // The shortest name first: of `foo`, `foo-dev` and `foo-doc` the first is the one that is described.
    descriptions.sort_by(|a, b| (a.package.len(), &a.package).cmp(&(b.package.len(), &b.package)));
    descriptions.dedup_by(|a, b| a.package == b.package);
    let mut report = Report { packages: descriptions.len(), ..Report::default() };
    report.boilerplate_paragraphs = remove_boilerplate(&mut descriptions);

    let (mut documents, mut summaries) = (Documents::default(), HashSet::new());
    let mut rows = vec![];
    for Description { package, synopsis, paragraphs } in descriptions {
        let document = paragraphs.join("\n");
        if !DOCUMENT_CHARS.contains(&document.chars().count()) || !SUMMARY_CHARS.contains(&synopsis.chars().count()) {
            report.wrong_length += 1;
        } else if letters(&document).starts_with(&letters(&synopsis)) {
            report.summary_in_document += 1;
        } else if summaries.contains(&letters(&synopsis)) || !documents.insert(&document) {
            report.twins += 1;
        } else {
            summaries.insert(letters(&synopsis));
            rows.push(Row { document, summary: synopsis, id: package });
        }
    }
    report.kept = rows.len();
    (rows, report)
}

fn remove_boilerplate(descriptions: &mut [Description]) -> usize {
    let mut packages: HashMap<String, usize> = HashMap::new();
    for description in descriptions.iter() {
        let distinct: HashSet<_> = description.paragraphs.iter().map(|paragraph| letters(paragraph)).collect();
        distinct.into_iter().for_each(|paragraph| *packages.entry(paragraph).or_default() += 1);
    }
    let mut removed = 0;
    for description in descriptions {
        let before = description.paragraphs.len();
        description.paragraphs.retain(|paragraph| packages[&letters(paragraph)] < BOILERPLATE_PACKAGES);
        removed += before - description.paragraphs.len();
    }
    removed
}

/// The documents kept so far, by their runs of words.
#[derive(Default)]
struct Documents {
    num_runs: Vec<usize>,
    holders: HashMap<u64, Vec<usize>>,
}

impl Documents {
    /// Adds a document unless it is another's twin: the packages of one source share their first paragraphs, and a
    /// hundred language packs differ in a word. Were both kept, one could be held out and the other trained on.
    fn insert(&mut self, document: &str) -> bool {
        let words: Vec<String> = document.split_whitespace().map(letters).filter(|word| !word.is_empty()).collect();
        let runs: HashSet<u64> = words.windows(RUN_WORDS).map(hash).collect();
        let mut shared: HashMap<usize, usize> = HashMap::new();
        for holder in runs.iter().filter_map(|run| self.holders.get(run)).flatten() {
            *shared.entry(*holder).or_default() += 1;
        }
        if shared.iter().any(|(&other, &shared)| 2 * shared >= runs.len().min(self.num_runs[other])) {
            return false;
        }
        for &run in &runs {
            self.holders.entry(run).or_default().push(self.num_runs.len());
        }
        self.num_runs.push(runs.len());
        true
    }
}

fn hash(words: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    words.hash(&mut hasher);
    hasher.finish()
}

fn letters(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(package: &str, synopsis: &str, paragraphs: &[&str]) -> Description {
        Description {
            package: package.into(),
            synopsis: synopsis.into(),
            paragraphs: paragraphs.iter().map(|p| p.to_string()).collect(),
        }
    }

    const TEA: &str = "Infuser keeps track of every pot of tea that is brewed in an office, who drank it and who washed up \
                       afterwards. It draws graphs of both, sends gentle reminders, and speaks to kettles over MQTT or plain HTTP.";

    #[test]
    fn siblings_are_one_row_under_the_shortest_name() {
        let with_files = |files: &str| vec![TEA.to_owned(), format!("This package holds the {files}.")];
        let descriptions = ["infuser-doc", "libinfuser-dev", "infuser"].map(|package| Description {
            package: package.into(),
            synopsis: format!("office tea accounting ({package})"),
            paragraphs: with_files(package),
        });
        let (rows, report) = clean(descriptions.to_vec());
        assert_eq!(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["infuser"]);
        assert_eq!((report.packages, report.twins, report.kept), (3, 2, 1));
    }

    #[test]
    fn boilerplate_and_empty_words_go() {
        let boilerplate = "This is a dummy package that eases upgrades and can be removed.";
        let mut all: Vec<_> = (0..BOILERPLATE_PACKAGES)
            .map(|i| description(&format!("dummy{i}"), "transitional package", &[boilerplate]))
            .collect();
        all.push(description("infuser", "office tea accounting", &[TEA, boilerplate]));
        all.push(description("echo", "Infuser keeps track of", &[TEA]));
        let (rows, report) = clean(all);
        let kept = Row { document: TEA.into(), summary: "office tea accounting".into(), id: "infuser".into() };
        assert_eq!(rows, [kept]);
        assert_eq!((report.boilerplate_paragraphs, report.summary_in_document), (BOILERPLATE_PACKAGES + 1, 1));
    }

    #[test]
    fn a_word_of_difference_makes_no_new_document() {
        let mut documents = Documents::default();
        assert!(documents.insert(TEA));
        assert!(!documents.insert(&TEA.replace("office", "laboratory")));
        assert!(!documents.insert(&format!("{TEA} It also keeps biscuits.")));
        assert!(documents.insert("A pot of tea that is brewed in a hurry tastes of nothing, as this program proves."));
    }
}
