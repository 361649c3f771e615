//! docs/oci.md names every field that the specification's types have, and tests that exist.

use anyhow::{Context, Result, ensure};
use oci_spec::runtime::Spec;
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Visitor, value,
};
use std::{cell::RefCell, collections::BTreeSet, fs, path::Path};

/// Fields that the types have and the specification has not, or under another name.
const OF_THE_TYPES_ALONE: [(&str, &str); 3] = [
    ("uidMappings", ""),
    ("gidMappings", ""),
    ("process.execCpuAffinity", "process.execCPUAffinity"),
];

/// What is listed as a whole: none of it is meant for a container of Linux.
const WHOLE: [&str; 4] = ["windows", "solaris", "zos", "vm"];

#[test]
fn the_table_lists_every_field() -> Result<()> {
    let listed: BTreeSet<String> = rows()?.into_iter().flat_map(|row| row.fields).collect();
    let known = fields();
    ensure!(known.len() > 150, "only {} fields were found", known.len());
    let missing: Vec<_> = known.difference(&listed).collect();
    ensure!(missing.is_empty(), "docs/oci.md lacks {missing:#?}");
    let strange: Vec<_> = listed.difference(&known).collect();
    ensure!(strange.is_empty(), "docs/oci.md has more: {strange:#?}");
    Ok(())
}

#[test]
fn the_tests_that_the_table_names_exist() -> Result<()> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    for entry in fs::read_dir(project().join("tests/oci"))? {
        let path = entry?.path();
        let property = path.file_stem().unwrap_or_default().to_string_lossy();
        let cases: Vec<serde_json::Value> = serde_json::from_str(&fs::read_to_string(&path)?)?;
        let of_case = cases.iter().filter_map(|case| case["name"].as_str());
        names.extend(of_case.map(|name| format!("{property}: {name}")));
    }
    let mut sources = String::new();
    for directory in ["guest-agent", "shim-v2/src", "tests/tests"] {
        read_sources(&project().join(directory), &mut sources)?;
    }
    for row in rows()? {
        ensure!(!row.tests.is_empty(), "{:?} has no test", row.fields);
        for test in row.tests {
            let exists = names.contains(&test) || sources.contains(&format!("fn {test}("));
            ensure!(exists, "{test:?}, of {:?}, does not exist", row.fields);
        }
    }
    Ok(())
}

struct Row {
    fields: Vec<String>,
    tests: Vec<String>,
}

fn project() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Rows of the tables: names in backquotes in the first cell are fields, in the last one tests.
fn rows() -> Result<Vec<Row>> {
    let path = project().join("docs/oci.md");
    let text = fs::read_to_string(&path).context("cannot read docs/oci.md")?;
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    Ok(rows
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split(" | ").collect();
            let quoted = |cell: Option<&&str>| {
                let parts = cell.copied().unwrap_or_default().split('`');
                parts.skip(1).step_by(2).map(str::to_owned).collect()
            };
            Row {
                fields: quoted(cells.first()),
                tests: quoted(cells.last()),
            }
        })
        .collect())
}

fn read_sources(directory: &Path, sources: &mut String) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            read_sources(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// Every field of the types, as a path. Walks breadth first: what a place has is asked by decoding a
/// configuration that has nothing but the way there.
fn fields() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut ahead = vec![Vec::new()];
    while let Some(way) = ahead.pop() {
        let names = RefCell::new(Vec::new());
        // Fails always: fields that must be there are not.
        let _ = Spec::deserialize(Walker {
            way: &way,
            names: &names,
        });
        for name in names.into_inner() {
            let mut next: Vec<&'static str> = way.clone();
            next.push(name);
            let path = next.join(".");
            match OF_THE_TYPES_ALONE.iter().find(|(own, _)| *own == path) {
                Some((_, "")) => continue,
                Some((_, name)) => found.insert((*name).to_owned()),
                None => found.insert(path),
            };
            if !WHOLE.contains(&name) {
                ahead.push(next);
            }
        }
    }
    found
}

/// A deserializer that follows one way through structures, and notes what fields are at its end.
#[derive(Clone, Copy)]
struct Walker<'a> {
    way: &'a [&'static str],
    names: &'a RefCell<Vec<&'static str>>,
}

impl<'de> Deserializer<'de> for Walker<'_> {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_unit()
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        if self.way.is_empty() {
            self.names.borrow_mut().extend(fields);
            return Err(de::Error::custom("the end of the way"));
        }
        visitor.visit_map(One(Some(self)))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_seq(One(Some(self)))
    }

    /// A map has keys of the user's; its values are what is looked at.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_map(Entry(Some(self)))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct tuple tuple_struct enum identifier ignored_any
    }
}

/// The one field that is on the way, or the one item.
struct One<'a>(Option<Walker<'a>>);

impl<'de> MapAccess<'de> for One<'_> {
    type Error = value::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Self::Error> {
        let name = self.0.and_then(|walker| walker.way.first().copied());
        name.map(|name| seed.deserialize(name.into_deserializer()))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, Self::Error> {
        let walker = self.0.take().ok_or_else(|| de::Error::custom("no way"))?;
        seed.deserialize(Walker {
            way: &walker.way[1..],
            ..walker
        })
    }
}

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = value::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Self::Error> {
        let walker = self.0.take();
        walker.map(|walker| seed.deserialize(walker)).transpose()
    }
}

struct Entry<'a>(Option<Walker<'a>>);

impl<'de> MapAccess<'de> for Entry<'_> {
    type Error = value::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Self::Error> {
        let key = self.0.map(|_| "key");
        key.map(|key| seed.deserialize(key.into_deserializer()))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, Self::Error> {
        let walker = self.0.take().ok_or_else(|| de::Error::custom("no way"))?;
        seed.deserialize(walker)
    }
}
