//! One unary call of gRPC over HTTP/2 on a Unix socket: connect, ask, hear the answer, hang up.

use anyhow::{Context, Result, bail, ensure};
use std::{path::Path, time::Duration};
use tokio::{net::UnixStream, runtime::Builder, time::timeout};
use tungstenite::{
    Bytes,
    http::{HeaderMap, Request},
};

/// The server's answer is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// gRPC's status code.
    pub code: i32,
    /// What the server says.
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "refused ({}): {}", self.code, self.message)
    }
}

impl std::error::Error for Refused {}

/// Makes a call; the error is [`Refused`] if the server answers with one.
pub(super) fn call(
    socket: &Path,
    method: &str,
    message: &[u8],
    limit: Duration,
) -> Result<Vec<u8>> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let exchange = async { timeout(limit, exchange(socket, method, message)).await };
    match runtime.block_on(exchange) {
        Ok(answer) => answer,
        Err(_) => bail!("no answer within {limit:?}"),
    }
}

async fn exchange(socket: &Path, method: &str, message: &[u8]) -> Result<Vec<u8>> {
    let stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    let (client, connection) = h2::client::handshake(stream).await?;
    // It ends with the runtime; what breaks it breaks the call below too.
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = client.ready().await?.send_request(request, false)?;
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len())?.to_be_bytes());
    frame.extend(message);
    body.send_data(Bytes::from(frame), true)?;
    let (head, mut body) = answer.await?.into_parts();
    let mut frame = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        frame.extend(data);
    }
    let trailers = body.trailers().await?;
    let status = trailers.as_ref().unwrap_or(&head.headers);
    match header(status, "grpc-status")?.parse()? {
        0 => {}
        code => {
            let message = unescaped(&header(status, "grpc-message").unwrap_or_default());
            bail!(Refused { code, message });
        }
    }
    let Some((prefix, message)) = frame.split_at_checked(5) else {
        bail!("an answer of {} bytes", frame.len());
    };
    let length = u32::try_from(message.len())?;
    ensure!(
        prefix[0] == 0 && prefix[1..] == length.to_be_bytes(),
        "a frame that starts with {prefix:?} and has {length} bytes more"
    );
    Ok(message.to_vec())
}

fn header(headers: &HeaderMap, name: &str) -> Result<String> {
    let value = headers.get(name).with_context(|| format!("no {name}"))?;
    Ok(value.to_str()?.to_owned())
}

/// Undoes the percent-encoding of messages.
fn unescaped(message: &str) -> String {
    let mut parts = message.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                bytes.extend(&part.as_bytes()[2..]);
            }
            None => bytes.extend(part.as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_unescaped() {
        assert_eq!(unescaped("a%0Ab%25 c"), "a\nb% c");
    }
}
