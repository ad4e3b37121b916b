<?php
$body = file_get_contents("php://input");
$text = "hello {$_SERVER['QUERY_STRING']} " . strlen($body) . "\n";
header("Content-Type: text/plain");
header("Content-Length: " . strlen($text));
echo $text;
