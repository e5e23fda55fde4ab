//! The process of one template, from its first line on: it gives up what it has, then answers requests.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use host::config::plan::GuestRef;
use host::worker;
use host::{Error, Result};
use tracing::field::Field;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::super::template;
use super::confine::{confine, limit_resources};
use super::protocol::{self, Answer, Opening, Request};

/// Serves a template to `parent`, over standard input and output.
pub fn serve(parent: &str) -> Result<()> {
    let parent = parent.parse().map_err(|error| Error::bug("a template is served to a process").cause(error))?;
    worker::die_with_parent(parent)?;
    host_ffi::process::close_inherited_files()
        .map_err(|error| Error::run("cannot close the files a template must not have").cause(error))?;
    talk().map_err(|error| Error::run("cannot serve the template").cause(error))
}

fn talk() -> io::Result<()> {
    let mut requests = io::stdin().lock();
    let answers = Answers(Arc::new(Mutex::new(File::from(io::stdout().as_fd().try_clone_to_owned()?))));
    let mut next = || protocol::read::<Request>(&mut requests, u64::MAX);
    let Some(Request::Open(opening)) = next()? else { return Ok(()) };
    limit_resources(opening.limits.memory_mb)?;
    let missing = confine().into_iter().map(str::to_owned).collect();
    let log = tracing_subscriber::registry().with(GuestLines(answers.clone()));
    tracing::subscriber::set_global_default(log).map_err(io::Error::other)?;

    // What wasmtime-wasi's output streams wait in; theirs would ask the kernel for more than is let through.
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let _entered = runtime.enter();
    let mut template = match open(opening) {
        Ok(template) => template,
        Err(error) => return answers.send(&Answer::Failed(error)),
    };
    answers.send(&Answer::Opened { missing })?;
    while let Some(request) = next()? {
        let outcome = match request {
            Request::Configure(columns) => template.configure(&columns).map(Answer::Columns),
            Request::Renew => template.renew().map(|()| Answer::Renewed),
            Request::Render(rows) => template.render(rows).map(Answer::Outcomes),
            Request::Open(_) => Err(Error::bug("a template was opened twice")),
        };
        answers.send(&outcome.unwrap_or_else(Answer::Failed))?;
    }
    Ok(())
}

fn open(opening: Opening) -> Result<Box<dyn host::data::template::RowTemplate>> {
    let guest: GuestRef =
        serde_json::from_str(&opening.guest).map_err(|error| Error::bug("a template is not named").cause(error))?;
    template::open_bytes(&guest, opening.bytes, &opening.limits)?.open()
}

/// The way back, for answers and for what the guest logs between them.
#[derive(Clone)]
struct Answers(Arc<Mutex<File>>);

impl Answers {
    fn send(&self, answer: &Answer) -> io::Result<()> {
        protocol::write(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), answer)
    }
}

/// Hands over what guests log; the worker has a log, this process has none.
struct GuestLines(Answers);

impl<S: tracing::Subscriber> Layer<S> for GuestLines {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        // That there are too many comes as one more line, at which the worker, which counts too, says so itself.
        if event.metadata().target() != "guest" {
            return;
        }
        let mut line = String::new();
        event.record(&mut |field: &Field, value: &dyn std::fmt::Debug| {
            if field.name() == "message" {
                line = format!("{value:?}");
            }
        });
        // Where nobody reads any more, the answer will find out.
        let _ = self.0.send(&Answer::Line(line));
    }
}
