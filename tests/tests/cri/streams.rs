//! What `kubectl exec`, `attach` and `port-forward` do.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use walnut_tests::{
    cri::{Cri, Pod, forward, says},
    ctr::Runtime,
    deadline::{self, Deadline},
};

use crate::pod::{SERVE, tell};

pub(crate) fn exec_attach_and_port_forward(cri: &Cri) -> Result<()> {
    tell(
        cri.pod(json!({}))?,
        &[
            ("exec", exec),
            ("exec with a terminal", terminal),
            ("attach", attach),
            ("port-forward", port_forward),
        ],
    )
}

fn exec(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("exec", SERVE, json!({}))?;
    let mut stream = container.stream("echo out; echo err >&2; exit 7", false, false)?;
    ensure!(stream.finish()? == 7, "{stream:?}");
    ensure!(
        stream.stdout == b"out\n" && stream.stderr == b"err\n",
        "{stream:?}"
    );
    let mut stream = container.stream("read a; echo got $a; read b; echo got $b", true, false)?;
    stream.write(b"one\n")?;
    stream.wait_for("got one\n")?;
    stream.write(b"two\n")?;
    ensure!(stream.finish()? == 0, "{stream:?}");
    says(&String::from_utf8_lossy(&stream.stdout), &["got two\n"])?;
    // Much, in order.
    let mut stream = container.stream("seq 200000", false, false)?;
    ensure!(stream.finish()? == 0, "{:?}", stream.stderr);
    let numbers: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    ensure!(
        stream.stdout == numbers.as_bytes(),
        "{} bytes",
        stream.stdout.len()
    );
    container.stop(0)?;
    container.remove()
}

fn terminal(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("terminal", SERVE, json!({}))?;
    let mut stream = container.stream("tty; while :; do read a; stty size; done", true, true)?;
    stream.wait_for("/dev/pts/")?;
    stream.resize(132, 43)?;
    // The size travels by another way than the input.
    deadline::until(
        "the terminal's new size",
        Deadline::after(deadline::REQUEST),
        || {
            let seen = stream.stdout.len();
            stream.write(b"\n")?;
            while !stream.stdout[seen..].ends_with(b"\n") || !stream.stdout[seen..].contains(&b' ')
            {
                ensure!(stream.read()?, "it ended: {stream:?}");
            }
            let said = String::from_utf8_lossy(&stream.stdout[seen..]).into_owned();
            Ok(said.contains("43 132").then_some(()))
        },
    )?;
    // Control-C reaches who reads the terminal.
    stream.write(&[3])?;
    let code = stream.finish()?;
    ensure!(code == 130, "{code}");
    container.stop(0)?;
    container.remove()
}

fn attach(pod: &mut Pod<'_>) -> Result<()> {
    let script = "while read line; do echo said $line; echo noted >&2; done";
    let container = pod.shell("attach", script, json!({ "stdin": true }))?;
    let mut first = container.attach(false)?;
    first.write(b"one\n")?;
    first.wait_for("said one\n")?;
    first.leave();
    // Who leaves ends nothing; who comes later is heard.
    let mut second = container.attach(false)?;
    second.write(b"two\n")?;
    second.wait_for("said two\n")?;
    second.leave();
    // containerd writes the log beside what it sends, not before.
    let wanted = ["said one", "said two", "noted"];
    let deadline = Deadline::after(deadline::REQUEST);
    deadline::until("all three lines in the log", deadline, || {
        let log: Vec<_> = container.log()?.into_iter().map(|line| line.text).collect();
        let has = |line| log.iter().any(|said| said == line);
        Ok(wanted.into_iter().all(has).then_some(()))
    })?;
    container.stop(0)?;
    container.remove()?;
    // With a terminal of its own.
    let over = json!({ "stdin": true, "tty": true });
    let container = pod.shell(
        "attach-tty",
        "tty; while read line; do echo said $line; done",
        over,
    )?;
    let mut stream = container.attach(true)?;
    stream.write(b"three\n")?;
    stream.wait_for("said three\r\n")?;
    stream.leave();
    container.stop(0)?;
    container.remove()
}

/// A server of both families on the loopback addresses alone, and one of IPv6 alone; `echo` says what it is told.
const SERVERS: &str = "mkdir -p /www/cgi-bin; seq 20000 > /www/numbers; cd /www/cgi-bin; \
    printf '#!/bin/sh\\nprintf \"Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n\"\\ncat\\necho .\\n' > echo; chmod +x echo; \
    httpd -p 127.0.0.1:8081 -h /www; httpd -f -p '[::1]:8082' -h /www";

fn port_forward(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("http", SERVERS, json!({}))?;
    for address in ["127.0.0.1:8081", "[::1]:8082"] {
        let listens = format!("wget -q -O /dev/null http://{address}/numbers");
        deadline::until("the server", Deadline::after(deadline::REQUEST), || {
            Ok((container.exec(&listens)?.code == 0).then_some(()))
        })?;
    }
    for port in [8081, 8082] {
        let request = b"GET /numbers HTTP/1.0\r\n\r\n";
        let answer = forward(&pod.port_forward(port)?, request, |bytes| {
            bytes.ends_with(b"\n20000\n")
        });
        let answer = answer.with_context(|| format!("port {port}"))?;
        says(&String::from_utf8_lossy(&answer[..20]), &["200 OK"])?;
    }
    // Much, both ways.
    let body: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
    let head = "POST /cgi-bin/echo HTTP/1.0\r\nContent-Length:";
    let request = format!("{head} {}\r\n\r\n{body}", body.len());
    let answer = forward(&pod.port_forward(8081)?, request.as_bytes(), |bytes| {
        bytes.ends_with(b"\n.\n")
    })?;
    let answer = String::from_utf8(answer)?;
    let echoed = answer
        .split_once("\r\n\r\n")
        .context("no end of the head")?;
    ensure!(echoed.1 == format!("{body}.\n"), "{} bytes", answer.len());
    // Where nobody listens, the caller is told.
    let nobody = forward(&pod.port_forward(8083)?, b"hello", |_| false);
    let refused = nobody.err().context("somebody listens on port 8083")?;
    // Walnut has accepted the connection before the guest refuses it.
    let how = match pod.cri().runtime() {
        Runtime::Walnut => "connection reset by peer",
        Runtime::Runc => "connection refused",
    };
    says(&format!("{refused:#}"), &[how])?;
    container.stop(0)?;
    container.remove()
}
