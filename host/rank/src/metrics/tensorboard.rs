//! TensorBoard's event files: records of a protobuf message each, as TensorFlow's `tfevents` have them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use host::Result;
use host::error::IoContext;
use prost::Message;

/// `tensorboard.Event`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds of Unix time.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// One event file, open for appending.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Creates a file in `folder`, under a name that TensorBoard looks for.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).path_context("create", folder)?;
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = format!("events.out.tfevents.{}.{machine}.{}.0", now() as u64, std::process::id());
        let path = folder.join(name);
        let file = File::create(&path).path_context("create", &path)?;
        let mut events = Self { file, path };
        events.write(&Event { wall_time: now(), step: 0, what: Some(What::FileVersion("brain.Event:2".into())) })?;
        Ok(events)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the scalars of a step, an event each as PyTorch's writer has it.
    pub fn scalars(&mut self, step: usize, scalars: &[(String, f64)]) -> Result<()> {
        let wall_time = now();
        scalars.iter().try_for_each(|(tag, value)| self.write(&scalar(wall_time, step, tag, *value)))
    }

    fn write(&mut self, event: &Event) -> Result<()> {
        self.file.write_all(&record(&event.encode_to_vec())).path_context("write", &self.path)
    }
}

fn scalar(wall_time: f64, step: usize, tag: &str, value: f64) -> Event {
    let value = Value { tag: tag.to_owned(), simple_value: Some(value as f32) };
    Event { wall_time, step: step as i64, what: Some(What::Summary(Summary { value: vec![value] })) }
}

/// A record of TFRecord: length, its checksum, the bytes, their checksum.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let (of_length, of_bytes) = (masked_crc(&length).to_le_bytes(), masked_crc(bytes).to_le_bytes());
    [&length[..], &of_length, bytes, &of_bytes].concat()
}

/// CRC-32C, rotated and offset so that a checksum of checksums stays one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What PyTorch 2.11's `SummaryWriter` with tensorboard 2.21 writes for
    /// `add_scalar("loss", 2.25, 3, walltime=1700000000.5)`, after its version record.
    const THEIRS: &str = "1a00000000000000129bd82d0900002040fc54d94110032a0d0a0b0a046c6f73731500001040011f4015";

    #[test]
    fn a_scalar_is_the_bytes_of_pytorchs_writer() {
        let ours = record(&scalar(1_700_000_000.5, 3, "loss", 2.25).encode_to_vec());
        assert_eq!(ours.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), THEIRS);
    }
}
