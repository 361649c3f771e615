//! Drives containerd by the CRI, as the kubelet does: requests and answers are JSON, in the words of Kubernetes'
//! published `api.proto`; a request with a field that it doesn't have is an error.
//!
//! Must not know how a runtime works: the same story is told to Walnut and to runc, the oracle.

mod container;
mod grpc;
mod log;
mod pod;
mod streaming;

pub use container::{Container, ExecResult};
pub use grpc::Refused;
pub use log::{LogLine, Tag};
pub use pod::Pod;
pub use streaming::{Streaming, forward};

use crate::{ctr::Runtime, deadline, requirement::CONTAINERD_SOCKET};
use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;
use protobuf::reflect::FileDescriptor;
use protobuf_json_mapping::{PrintOptions, parse_dyn_from_str, print_to_string_with_options};
use protobuf_parse::Parser;
use serde_json::Value;
use std::{fs, path::Path};

/// Kubernetes' `pkg/apis/runtime/v1/api.proto`, unchanged.
const API: &str = include_str!("api.proto");

/// The CRI service of this node's containerd.
#[derive(Debug)]
pub struct Cri {
    api: FileDescriptor,
    runtime: Runtime,
    /// The node's name for the runtime and how it runs.
    handler: &'static str,
}

impl Cri {
    /// Pods will run with this runtime.
    pub fn with(runtime: Runtime) -> Result<Self> {
        let handler = match runtime {
            Runtime::Walnut => "walnut",
            Runtime::Runc => "runc",
        };
        Self::with_handler(runtime, handler)
    }

    /// Pods will run with Walnut by containerd's Sandbox API, without a pause container.
    pub fn by_sandbox_api() -> Result<Self> {
        Self::with_handler(Runtime::Walnut, "walnut-sandbox")
    }

    /// Reads the API.
    fn with_handler(runtime: Runtime, handler: &'static str) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a directory")?;
        let file = folder.path().join("api.proto");
        fs::write(&file, API).context("cannot write api.proto")?;
        let parsed = Parser::new()
            .pure()
            .include(folder.path())
            .input(&file)
            .file_descriptor_set()
            .context("cannot read api.proto")?;
        let files = FileDescriptor::new_dynamic_fds(parsed.file, &[]).context("api.proto")?;
        let api = files.into_iter().next().context("no file in api.proto")?;
        Ok(Self {
            api,
            runtime,
            handler,
        })
    }

    /// Who runs the Pods.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Makes a call that must succeed. A refusal is the error [`Refused`].
    pub fn call(&self, method: &str, request: Value) -> Result<Value> {
        let message = |suffix: &str| {
            let name = format!("{method}{suffix}");
            let found = self.api.message_by_package_relative_name(&name);
            found.with_context(|| format!("the CRI has no message {name}"))
        };
        let request = parse_dyn_from_str(&message("Request")?, &request.to_string())
            .with_context(|| format!("not a {method}Request: {request}"))?;
        let service = if method.contains("Image") {
            "ImageService"
        } else {
            "RuntimeService"
        };
        let path = format!("/runtime.v1.{service}/{method}");
        let body = request.write_to_bytes_dyn().context("cannot encode")?;
        let answer = grpc::call(Path::new(CONTAINERD_SOCKET), &path, &body, deadline::BOOT)
            .with_context(|| method.to_owned())?;
        let answer = message("Response")?
            .parse_from_bytes(&answer)
            .with_context(|| format!("not a {method}Response"))?;
        let options = PrintOptions {
            proto_field_name: true,
            always_output_default_values: true,
            ..Default::default()
        };
        let json = print_to_string_with_options(&*answer, &options)
            .with_context(|| format!("{method}Response as JSON"))?;
        serde_json::from_str(&json).with_context(|| format!("not JSON: {json}"))
    }

    /// Makes a call that must be refused; gives why.
    pub fn refused(&self, method: &str, request: Value) -> Result<Refused> {
        match self.call(method, request) {
            Ok(answer) => bail!("{method} was not refused: {answer}"),
            Err(error) => error.downcast::<Refused>(),
        }
    }
}

/// A number of an answer, which JSON writes as text if it has 64 bits; messages of one `value` stand for it.
pub fn number(value: &Value) -> Result<i64> {
    let value = value.get("value").unwrap_or(value);
    let number = match value {
        Value::String(digits) => digits.parse().ok(),
        value => value.as_i64(),
    };
    number.with_context(|| format!("no number: {value}"))
}

/// A text of an answer.
pub fn text(value: &Value) -> Result<String> {
    let text = value.as_str().with_context(|| format!("no text: {value}"));
    text.map(str::to_owned)
}

/// Bytes of an answer, which JSON writes in base64.
fn bytes(value: &Value) -> Result<Vec<u8>> {
    let decoded = BASE64.decode(text(value)?.as_bytes());
    decoded.with_context(|| format!("not base64: {value}"))
}

/// Puts `over` over `base`: objects field by field, lists one after the other.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                merge(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (Value::Array(base), Value::Array(over)) => base.extend(over),
        (base, over) => *base = over,
    }
}

/// Fails unless `text` has all of `words`.
pub fn says(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in {text:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_published_api_is_read_and_its_fields_are_checked() {
        let cri = Cri::with(Runtime::Runc).unwrap();
        let message = |json: &str| {
            let request = cri.api.message_by_package_relative_name("ExecSyncRequest");
            parse_dyn_from_str(&request.unwrap(), json)
        };
        assert!(message(r#"{"container_id":"a","cmd":["b"],"timeout":3}"#).is_ok());
        assert!(message(r#"{"container":"a"}"#).is_err());
    }

    #[test]
    fn numbers_of_every_kind_are_read() {
        for value in [json!(7), json!("7"), json!({ "value": "7" })] {
            assert_eq!(number(&value).unwrap(), 7);
        }
        assert!(number(&json!("seven")).is_err());
    }

    #[test]
    fn what_is_put_over_replaces_values_and_adds_to_lists() {
        let mut base = json!({ "a": { "b": 1, "c": 2 }, "l": [1] });
        merge(&mut base, json!({ "a": { "b": 3 }, "l": [2] }));
        assert_eq!(base, json!({ "a": { "b": 3, "c": 2 }, "l": [1, 2] }));
    }
}
