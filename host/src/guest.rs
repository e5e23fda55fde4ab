//! Where a guest's file holds what it says of itself; what that means is [`crate::config::metadata`]'s.
//!
//! A component has it in the custom section [`SECTION`], which `host_sdk::metadata!` writes and a tool of any other language
//! can: TOML, before it a first line `# FILE:LINE` that says where its author wrote it, if that is known. A script has it
//! in the comment it opens with (`//!`): the first paragraph describes it, and a block fenced by ```` ```toml ```` is the
//! metadata. Nothing of the guest is run or compiled.

use std::path::Path;

use wasmparser::{Parser, Payload};

use crate::config::metadata::{self, MAX_BYTES, Metadata, Source};
use crate::error::{Error, Result};

/// The custom section of a component.
pub const SECTION: &str = "host:meta";

/// What the guest in a file says of itself. A file that cannot be read says nothing: whoever opens it says why.
pub fn metadata(path: &Path) -> Result<Metadata> {
    // A pipe would be waited for.
    match std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()).then(|| std::fs::read(path)) {
        Some(Ok(bytes)) => metadata_of(path, &bytes),
        _ => Ok(Metadata::default()),
    }
}

/// What the guest with these bytes says of itself.
pub fn metadata_of(path: &Path, bytes: &[u8]) -> Result<Metadata> {
    if bytes.starts_with(b"\0asm") {
        return of_component(path, bytes);
    }
    // What is no text is no script, which whoever opens it says.
    std::str::from_utf8(bytes).map_or(Ok(Metadata::default()), |text| of_script(path, text))
}

fn of_component(path: &Path, bytes: &[u8]) -> Result<Metadata> {
    let sections = Parser::new(0).parse_all(bytes).map_while(std::result::Result::ok);
    let mut found = sections.filter_map(|payload| match payload {
        Payload::CustomSection(section) if section.name() == SECTION => Some(section.data()),
        _ => None,
    });
    let Some(data) = found.next() else { return Ok(Metadata::default()) };
    let fail = |why: String| Error::config(format!("cannot read the metadata of `{}`", path.display())).cause(why);
    if found.next().is_some() {
        return Err(fail(format!("it has more than one section `{SECTION}`"))
            .hint("call `host_sdk::metadata!` once, in the crate of the guest"));
    }
    let text =
        std::str::from_utf8(data).map_err(|error| fail(format!("the section `{SECTION}` is no text: {error}")))?;
    metadata::parse(&located(path, text))
}

/// The text of a section with the place its first line names.
fn located(path: &Path, text: &str) -> Source {
    let place = text.strip_prefix("# ").and_then(|rest| {
        let (place, rest) = rest.split_once('\n')?;
        let (file, line) = place.rsplit_once(':')?;
        let is_plain = !file.is_empty() && file.len() < 4096 && !file.chars().any(char::is_control);
        Some((is_plain.then_some(file)?, line.parse().ok()?, rest))
    });
    match place {
        Some((file, line, rest)) => Source { text: rest.into(), file: file.into(), line, margin: 0 },
        None => Source { text: text.into(), file: path.into(), line: 1, margin: 0 },
    }
}

fn of_script(path: &Path, text: &str) -> Result<Metadata> {
    const MARK: &str = "//!";
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().skip_while(|(_, line)| line.trim().is_empty());
    let comment = lines.map_while(|(index, line)| Some((index + 1, line.trim_start().strip_prefix(MARK)?)));
    let (mut description, mut described) = (String::new(), false);
    let mut blocks: Vec<Source> = vec![];
    // The fence that is open, and whether it is of metadata.
    let mut open: Option<(usize, bool)> = None;
    for (number, line) in comment {
        let content = line.strip_prefix(' ').unwrap_or(line);
        match (open, content.trim_end().strip_prefix("```")) {
            (None, Some(language)) => {
                described = true;
                let is_metadata = language.trim() == "toml";
                if is_metadata {
                    let margin = MARK.len() + line.len() - content.len();
                    blocks.push(Source { text: String::new(), file: path.into(), line: number + 1, margin });
                }
                open = Some((number, is_metadata));
            }
            (Some(_), Some("")) => open = None,
            (Some((_, true)), _) => {
                let Some(block) = blocks.last_mut() else { continue };
                block.text.push_str(content);
                block.text.push('\n');
                if block.text.len() > MAX_BYTES {
                    break;
                }
            }
            (Some((_, false)), _) => {}
            (None, None) if content.trim().is_empty() => described |= !description.is_empty(),
            (None, None) if !described => {
                description.extend((!description.is_empty()).then_some(' '));
                description.push_str(content.trim());
            }
            (None, None) => {}
        }
    }
    if let (Some((line, true)), false) = (open, blocks.last().is_some_and(|block| block.text.len() > MAX_BYTES)) {
        return Err(Error::config(format!("the metadata of `{}` has no end", path.display()))
            .at(path, Some(line), None)
            .hint("a line of `//!` and three backticks ends the block"));
    }
    if let [_, second, ..] = &blocks[..] {
        return Err(Error::config(format!("`{}` has more than one block of metadata", path.display()))
            .at(path, Some(second.line - 1), None)
            .hint("put all of it into the first"));
    }
    let mut metadata = blocks.first().map_or(Ok(Metadata::default()), metadata::parse)?;
    let plain = description.replace(char::is_control, " ");
    if metadata.description.is_none() {
        metadata.description = Some(plain).filter(|description| !description.is_empty());
    }
    Ok(metadata)
}
