//! `--manifest`: several subjects in one file, as TOML, JSON, or JSON a line.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::subject::Subject;
use crate::{Error, Result};

/// What is read of a file at most: room for ten thousand subjects.
const MAX_BYTES: u64 = 16 << 20;

/// A folder's name is no longer on most file systems.
const MAX_NAME_BYTES: usize = 255;

const HINT: &str = "a subject has image, source_text and, if need be, name, target_texts and seed; --manifest's example in \
                    README.md shows them";

/// One subject as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Option<String>,
    image: PathBuf,
    source_text: String,
    #[serde(default)]
    target_texts: Vec<String>,
    seed: Option<u64>,
}

/// In TOML, a subject is a table `[[subject]]`; in JSON, an object of one array.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tables {
    #[serde(default)]
    subject: Vec<Entry>,
}

/// Reads a manifest. Relative paths are relative to its folder; a subject without a name has its photo's, one without a seed
/// has `seed`.
///
/// # Errors
/// When the file cannot be read, an entry is malformed, or two have the same name; the error says which.
pub fn read(path: &Path, seed: u64) -> Result<Vec<Subject>> {
    let length = std::fs::metadata(path).map_err(Error::io(path, "cannot be read"))?.len();
    if length > MAX_BYTES {
        let message = format!("{}: has {length} bytes, a manifest at most {MAX_BYTES}", path.display());
        return Err(Error::refused(message, HINT));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path, "cannot be read"))?;
    parse(&bytes, path, seed)
}

/// [`read`] from memory; the path's ending says what the bytes are.
fn parse(bytes: &[u8], path: &Path, seed: u64) -> Result<Vec<Subject>> {
    let refused =
        |what: String, hint: &str| Error::refused(format!("{}: {what}", path.display()), hint.to_owned());
    let malformed = |what: String| refused(what, HINT);
    let text = std::str::from_utf8(bytes).map_err(|_| malformed("is not UTF-8 text".into()))?;
    let text = text.trim_start_matches('\u{feff}');
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let entries = match ending.to_ascii_lowercase().as_str() {
        "toml" => from_toml(text),
        "json" => serde_json::from_str(text).map_err(|error| json_error(&error, error.line())),
        "jsonl" => from_json_lines(text),
        _ => {
            let hint = "name the file subjects.toml, subjects.json or subjects.jsonl, as its content is";
            return Err(refused("is not called .toml, .json or .jsonl".into(), hint));
        }
    };
    let entries: Vec<Entry> = entries.map_err(malformed)?;
    if entries.is_empty() {
        return Err(malformed("has no subjects".into()));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut subjects: Vec<Subject> = Vec::with_capacity(entries.len());
    let mut names = std::collections::HashMap::new();
    for (number, entry) in (1..).zip(entries) {
        let subject =
            subject(entry, folder, seed).map_err(|what| malformed(format!("subject {number}: {what}")))?;
        // Some file systems take Rabbit and rabbit for one.
        let name = subject.name.clone().unwrap_or_default();
        if let Some(other) = names.insert(name.to_lowercase(), number) {
            let what = format!("subjects {other} and {number} are both called {name:?}");
            return Err(refused(what, "give each a name of its own: it is the folder of its results"));
        }
        subjects.push(subject);
    }
    Ok(subjects)
}

fn from_toml(text: &str) -> Result<Vec<Entry>, String> {
    let tables: Tables = toml::from_str(text).map_err(|error| match error.span() {
        Some(span) => {
            let before = text.bytes().take(span.start).filter(|byte| *byte == b'\n').count();
            format!("line {}: {}", before + 1, error.message())
        }
        None => error.message().to_owned(),
    })?;
    Ok(tables.subject)
}

fn from_json_lines(text: &str) -> Result<Vec<Entry>, String> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(number, line)| serde_json::from_str(line).map_err(|e| json_error(&e, number))).collect()
}

fn json_error(error: &serde_json::Error, line: usize) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    format!("line {line}: {}", text.strip_suffix(&place).unwrap_or(&text))
}

/// What an entry means, or what is wrong with it.
fn subject(entry: Entry, folder: &Path, seed: u64) -> Result<Subject, String> {
    let Entry { name, image, source_text, target_texts, seed: own_seed } = entry;
    if image.as_os_str().is_empty() {
        return Err("its image is empty".into());
    }
    let blank = |text: &String| text.trim().is_empty();
    if blank(&source_text) {
        return Err("its source_text is empty".into());
    }
    if target_texts.iter().any(blank) {
        return Err("one of its target_texts is empty".into());
    }
    let name = match name {
        Some(name) => name,
        None => image.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned(),
    };
    if !is_folder_name(&name) {
        return Err(format!("{name:?} cannot be a folder's name; give it a name of letters and digits"));
    }
    let (image, seed) = (folder.join(image), own_seed.unwrap_or(seed));
    Ok(Subject { name: Some(name), image, source_text, target_texts, seed })
}

/// Whether a folder can be called so, here and on other systems.
fn is_folder_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name)
        && name.len() <= MAX_NAME_BYTES
        && !name.contains(|c: char| c.is_control() || "/\\:*?\"<>|".contains(c))
        && !name.starts_with([' ', '.'])
        && !name.ends_with([' ', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn refusal(name: &str, text: &str) -> String {
        parse(text.as_bytes(), Path::new(name), 0).unwrap_err().line()
    }

    #[test]
    fn the_three_ways_say_the_same() {
        let toml = "[[subject]]\nname = \"Max\"\nimage = \"dogs/1.png\"\nsource_text = \"a dog\"\nseed = 3\n\
                    target_texts = [\"a dog jumping\"]\n\n[[subject]]\nimage = \"/cat.jpg\"\nsource_text = 'a cat'\n";
        let lines = [
            r#"{"name":"Max","image":"dogs/1.png","source_text":"a dog","seed":3,"target_texts":["a dog jumping"]}"#,
            r#"{"image":"/cat.jpg","source_text":"a cat"}"#,
        ];
        let subject = |name: &str, image: &str, text: &str, targets: &[&str], seed| Subject {
            name: Some(name.into()),
            image: image.into(),
            source_text: text.into(),
            target_texts: targets.iter().map(|&text| text.into()).collect(),
            seed,
        };
        let expected = [
            subject("Max", "pets/dogs/1.png", "a dog", &["a dog jumping"], 3),
            subject("cat", "/cat.jpg", "a cat", &[], 7),
        ];
        for (name, text) in [
            ("pets/all.toml", toml.to_owned()),
            ("pets/all.JSON", format!("[{}]", lines.join(","))),
            ("pets/all.jsonl", format!("\u{feff}{}\n\n", lines.join("\r\n"))),
        ] {
            assert_eq!(parse(text.as_bytes(), Path::new(name), 7).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let good = r#"{"image": "a.png", "source_text": "a dog"}"#;
        let json = |rest: &str| format!("[{good},\n{{\"image\": \"b.png\", {rest}}}]");
        for (name, text, expected) in [
            (
                "m.json",
                json(r#""source_text": "b", "sead": 3"#),
                "line 2: unknown field `sead`, expected one of",
            ),
            ("m.json", json(r#""name": "b""#), "line 2: missing field `source_text`"),
            ("m.json", json(r#""source_text": 3"#), "line 2: invalid type: integer `3`, expected a string"),
            ("m.json", json(r#""source_text": "b", "seed": -1"#), "line 2: invalid value: integer `-1`"),
            ("m.json", json(r#""source_text": " ""#), "subject 2: its source_text is empty"),
            (
                "m.json",
                json(r#""source_text": "b", "target_texts": [""]"#),
                "subject 2: one of its target_texts",
            ),
            ("m.json", json(r#""source_text": "b", "name": "A""#), "subjects 1 and 2 are both called \"A\""),
            (
                "m.json",
                json(r#""source_text": "b", "name": "../b""#),
                "subject 2: \"../b\" cannot be a folder's name",
            ),
            ("m.json", good.into(), "line 1: invalid type: map, expected a sequence"),
            ("m.json", "[]".into(), "has no subjects"),
            ("m.jsonl", format!("{good}\n\n{{\"image\": 3"), "line 3: invalid type: integer `3`"),
            ("m.jsonl", "\n".into(), "has no subjects"),
            ("m.toml", String::new(), "has no subjects"),
            (
                "m.toml",
                "[[subject]]\nimage = 'a.png'\nsource_text = 'a'\nsead = 1".into(),
                "line 4: unknown field `sead`",
            ),
            ("m.toml", "[[subject]]\nimage = 'a.png'".into(), "line 1: missing field `source_text`"),
            (
                "m.toml",
                "[[subjects]]\nimage = 'a.png'".into(),
                "line 1: unknown field `subjects`, expected `subject`",
            ),
            ("m.toml", "[[subject]\n".into(), "line 1: "),
            ("m.yaml", String::new(), "is not called .toml, .json or .jsonl"),
        ] {
            let error = refusal(name, &text);
            assert!(error.starts_with(&format!("{name}: {expected}")), "{error}");
        }
        assert!(parse(b"\xff", Path::new("m.toml"), 0).unwrap_err().line().contains("not UTF-8"));
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a/",
            "a\\b",
            "c:",
            " a",
            "a.",
            "a\nb",
            "a\0",
            ".hidden",
            &"x".repeat(256),
        ] {
            assert!(!is_folder_name(name), "{name:?}");
        }
        for name in ["rabbit", "Max 2", "犬", "a.b", "a-b_c"] {
            assert!(is_folder_name(name), "{name:?}");
        }
    }

    /// Text that is a manifest, or was one before some of it was changed.
    fn manifests() -> impl Strategy<Value = String> {
        let texts = prop::sample::select(vec![
            "",
            " ",
            "a",
            "A",
            "a.png",
            "../a",
            "/",
            "犬",
            "\u{0}",
            "[[subject]]",
            "\"",
        ]);
        let value = prop_oneof![
            texts.prop_map(|text| json!(text)),
            any::<i64>().prop_map(|number| json!(number)),
            Just(json!(["b"])),
            Just(Value::Null),
        ];
        let key = prop::sample::select(vec!["name", "image", "source_text", "target_texts", "seed", "other"]);
        let entry = prop::collection::vec((key, value), 0..6);
        let write = |(entries, form): (Vec<Vec<(&str, Value)>>, usize)| -> String {
            let object = |entry: &Vec<(&str, Value)>| {
                let fields = entry.iter().map(|(key, value)| format!("{key:?}: {value}"));
                format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
            };
            let table = |entry: &Vec<(&str, Value)>| {
                entry
                    .iter()
                    .fold("[[subject]]\n".into(), |text, (key, value)| format!("{text}{key} = {value}\n"))
            };
            match form {
                0 => entries.iter().map(table).collect(),
                1 => format!("[{}]", entries.iter().map(object).collect::<Vec<_>>().join(",")),
                _ => entries.iter().map(object).collect::<Vec<_>>().join("\n"),
            }
        };
        let whole = (prop::collection::vec(entry, 0..4), 0usize..3).prop_map(write);
        (whole, any::<prop::sample::Index>(), ".?", any::<bool>()).prop_map(|(text, at, noise, damage)| {
            let mut letters: Vec<char> = text.chars().collect();
            if damage && !letters.is_empty() {
                let at = at.index(letters.len());
                letters.splice(at..at + 1, noise.chars());
            }
            letters.into_iter().collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_text_is_subjects_or_is_refused(text in prop_oneof![4 => manifests(), 1 => any::<String>()]) {
            for name in ["in/m.toml", "in/m.json", "in/m.jsonl"] {
                match parse(text.as_bytes(), Path::new(name), 0) {
                    Ok(subjects) => {
                        let names = subjects.iter().map(|s| s.name.as_ref().unwrap().to_lowercase());
                        let different: std::collections::BTreeSet<String> = names.collect();
                        prop_assert!(different.len() == subjects.len() && !subjects.is_empty());
                        for Subject { name, image, source_text, target_texts, .. } in &subjects {
                            prop_assert!(is_folder_name(name.as_ref().unwrap()));
                            prop_assert!(image.starts_with("in") || image.is_absolute());
                            prop_assert!(!source_text.trim().is_empty());
                            prop_assert!(target_texts.iter().all(|text| !text.trim().is_empty()));
                        }
                    }
                    Err(error) => prop_assert!(error.line().starts_with(name) && error.hint().is_some()),
                }
            }
        }

        #[test]
        fn what_is_written_is_read(source in ".*[a-z].*", targets in prop::collection::vec(".*[a-z]", 0..3), seed: u64) {
            let entry = json!({"image": "a.png", "source_text": source, "target_texts": targets, "seed": seed});
            let read = |name, text: &str| parse(text.as_bytes(), Path::new(name), 0).unwrap();
            let subjects = read("m.json", &json!([entry]).to_string());
            prop_assert_eq!(&subjects, &read("m.jsonl", &entry.to_string()));
            let Subject { source_text, target_texts, seed: read_seed, .. } = &subjects[0];
            prop_assert_eq!((source_text, target_texts, *read_seed), (&source, &targets, seed));
        }
    }
}
